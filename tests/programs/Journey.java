// A Java program with threads, a heap that is collected and code that is compiled while it runs; checks itself and speaks as
// subjects do (tests/subjects/subject.h):  java -cp DIRECTORY Journey --state FILE
import java.nio.file.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.zip.CRC32;

public class Journey {
    static final int THREADS = 4, RECORDS = 3000;
    static Path state;

    static void say(String line) throws Exception {
        Files.writeString(state, line + "\n", StandardOpenOption.CREATE, StandardOpenOption.APPEND);
    }

    /** Replaces its records all the time, each by one that follows from it, and can always say whether they hold. */
    static class Worker extends Thread {
        final int number;
        final byte[][] records = new byte[RECORDS][];
        final long[] sums = new long[RECORDS];
        final SynchronousQueue<Integer> questions = new SynchronousQueue<>();
        final SynchronousQueue<String> answers = new SynchronousQueue<>();
        long steps;

        Worker(int number) {
            this.number = number;
            setDaemon(true);
            Random random = new Random(number);
            for (int i = 0; i < RECORDS; i++) {
                records[i] = new byte[500 + i % 700];
                random.nextBytes(records[i]);
                sums[i] = sum(records[i]);
            }
        }

        static long sum(byte[] bytes) {
            CRC32 crc = new CRC32();
            crc.update(bytes);
            return crc.getValue();
        }

        String check() {
            for (int i = 0; i < RECORDS; i++)
                if (sum(records[i]) != sums[i]) return "worker " + number + ": record " + i + " differs";
            return "";
        }

        public void run() {
            Random random = new Random(-number);
            try {
                while (true) {
                    if (questions.poll(1, TimeUnit.MILLISECONDS) != null) answers.put(check());
                    for (int n = 0; n < 20; n++) {
                        int i = random.nextInt(RECORDS);
                        byte[] next = records[i].clone();
                        for (int k = 0; k < next.length; k++) next[k] = (byte) (next[k] * 5 + k);
                        records[i] = next;
                        sums[i] = sum(next);
                        steps++;
                    }
                }
            } catch (InterruptedException end) {
                throw new IllegalStateException(end);
            }
        }
    }

    public static void main(String[] arguments) throws Exception {
        state = Path.of(arguments[1]);
        Path ask = Path.of(state + ".ask");
        List<Worker> workers = new ArrayList<>();
        for (int n = 1; n <= THREADS; n++) workers.add(new Worker(n));
        for (Worker worker : workers) worker.start();
        say("READY " + ProcessHandle.current().pid() + " 0");
        int answered = 0;
        long last = System.nanoTime();
        while (true) {
            Thread.sleep(10);
            long now = System.nanoTime();
            if (now < last || now > last + 30_000_000_000L) say("FAIL " + (answered + 1) + " the clock went from " + last + " to " + now);
            last = now;
            String question;
            try {
                question = Files.readString(ask);
            } catch (NoSuchFileException none) {
                continue;
            }
            if (!question.endsWith("\n")) continue;
            question = question.strip();
            if (question.equals("end")) {
                say("BYE");
                Runtime.getRuntime().halt(0);
            }
            if (Integer.parseInt(question) <= answered) continue;
            answered = Integer.parseInt(question);
            StringBuilder problems = new StringBuilder();
            for (Worker worker : workers) {
                long before = worker.steps;
                worker.questions.put(answered);
                String problem = worker.answers.poll(20, TimeUnit.SECONDS);
                if (problem == null) problem = "worker " + worker.number + " does not answer";
                if (worker.steps < before) problem += " worker " + worker.number + " went back";
                problems.append(problem);
            }
            System.gc();
            say(problems.length() == 0 ? "PASS " + answered : "FAIL " + answered + " " + problems);
        }
    }
}
