"""Python's multiprocessing: workers that share a queue, a lock, a value and memory with their parent, and check themselves;
speaks as subjects do (tests/subjects/subject.h).

pool.py --state FILE
"""

import multiprocessing
import os
import random
import sys
import time

state = sys.argv[2]
WORKERS = 3
SIZE = 1 << 20


def say(line):
    with open(state, "a") as file:
        file.write(line + "\n")


def pattern(number, length=200_000):
    return random.Random(number).randbytes(length)


def work(number, questions, answers, counter, shared):
    """Answers with what is wrong, and counts."""
    own = pattern(number)
    while True:
        question = questions.get()
        if question is None:
            return
        problem = "" if own == pattern(number) else f"memory of {number} differs"
        with counter.get_lock():
            counter.value += question
            shared[question % SIZE] = counter.value % 251
        answers.put((number, problem))


def main():
    context = multiprocessing.get_context("fork")
    questions, answers = context.SimpleQueue(), context.SimpleQueue()
    counter = context.Value("q", 0)
    shared = context.RawArray("B", SIZE)
    for index, byte in enumerate(pattern(99, SIZE)):
        shared[index] = byte
    workers = [
        context.Process(target=work, args=(number, questions, answers, counter, shared))
        for number in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    wanted = bytearray(pattern(99, SIZE))
    say(f"READY {os.getpid()} 0")
    answered = expected = 0
    while True:
        time.sleep(0.01)
        try:
            with open(state + ".ask") as file:
                question = file.read()
        except FileNotFoundError:
            continue
        if not question.endswith("\n"):
            continue
        if question == "end\n":
            for _ in workers:
                questions.put(None)
            for worker in workers:
                worker.join(20)
            codes = [worker.exitcode for worker in workers]
            if codes != [0] * WORKERS:
                say(f"FAIL {answered + 1} the workers ended with {codes}")
            say("BYE")
            os._exit(0)
        number = int(question)
        if number <= answered:
            continue
        answered = number
        problems = []
        for turn in range(3 * WORKERS):
            step = number * 100 + turn + 1
            questions.put(step)
            who, problem = answers.get()
            problems += [problem] if problem else []
            expected += step
            wanted[step % SIZE] = expected % 251
        if counter.value != expected:
            problems.append(f"the counter is {counter.value}, not {expected}")
        if bytes(shared) != wanted:
            problems.append("shared memory differs")
        if any(not worker.is_alive() for worker in workers):
            problems.append("a worker is gone")
        say(f"FAIL {number} {'; '.join(problems)}" if problems else f"PASS {number}")


main()
