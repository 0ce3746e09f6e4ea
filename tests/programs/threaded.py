"""A threaded Python program that checks itself and speaks as subjects do (tests/subjects/subject.h).

threaded.py --state FILE

While FILE.quiet exists no thread of it executes anything: the workers wait at a gate without a timeout, and the main thread
opens that named pipe for reading, which ends when somebody opens it for writing.
"""

import hashlib
import os
import queue
import random
import sys
import threading
import time

state = sys.argv[2]
THREADS = 6


gate = threading.Event()
gate.set()
at_gate = threading.Semaphore(0)


def say(line):
    with open(state, "a") as file:
        file.write(line + "\n")


class Worker(threading.Thread):
    """Keeps a hash chain over its own data and can always say whether it still holds."""

    def __init__(self, number):
        super().__init__(daemon=True)
        self.number = number
        self.rng = random.Random(number)
        self.data = {i: self.rng.randbytes(1000 + i % 50) for i in range(4000)}
        self.links = []
        self.inbox = queue.Queue()
        self.beats = 0

    def sum(self):
        digest = hashlib.sha256()
        for key in sorted(self.data):
            digest.update(self.data[key])
        return digest.hexdigest()

    def run(self):
        while True:
            if not gate.is_set():
                at_gate.release()
                gate.wait()
            try:
                answer = self.inbox.get(timeout=0.01)
                answer.put(self.check())
            except queue.Empty:
                pass
            key = self.rng.randrange(4000)
            before = self.data[key]
            self.data[key] = hashlib.sha256(before).digest() + before[32:]
            self.links.append((key, before[:32]))
            if len(self.links) > 2000:
                del self.links[:1000]
            self.beats += 1

    def check(self):
        seen = set()
        for key, before in reversed(self.links):
            if key not in seen:
                seen.add(key)
                if self.data[key][:32] != hashlib.sha256(before + self.data[key][32:]).digest():
                    return f"worker {self.number}: link {key} is broken"
        rng = random.Random(self.number)
        for i in range(4000):
            if self.data[i][32:] != rng.randbytes(1000 + i % 50)[32:]:
                return f"worker {self.number}: data {i} differs"
        return None


workers = [Worker(number) for number in range(THREADS)]
for worker in workers:
    worker.start()
started = time.monotonic()
say(f"READY {os.getpid()} 0")
answered = 0
last = started
while True:
    time.sleep(0.005)
    now = time.monotonic()
    if not last <= now < last + 30:
        say(f"FAIL {answered + 1} time.monotonic went from {last} to {now}")
    last = now
    if os.path.exists(state + ".quiet"):
        gate.clear()
        for worker in workers:
            at_gate.acquire()
        try:
            open(state + ".quiet").close()
        except FileNotFoundError:
            pass
        gate.set()
        last = time.monotonic()
    try:
        with open(state + ".ask") as file:
            question = file.read()
    except FileNotFoundError:
        continue
    if not question.endswith("\n"):
        continue
    if question == "end\n":
        say("BYE")
        os._exit(0)
    round = int(question)
    if round <= answered:
        continue
    problems = []
    for worker in workers:
        beats = worker.beats
        answers = queue.Queue()
        worker.inbox.put(answers)
        try:
            problem = answers.get(timeout=20)
        except queue.Empty:
            problem = f"worker {worker.number} does not answer"
        if problem:
            problems.append(problem)
        if worker.beats < beats:
            problems.append(f"worker {worker.number} went back")
    answered = round
    say(f"FAIL {round} {'; '.join(problems)}" if problems else f"PASS {round}")
