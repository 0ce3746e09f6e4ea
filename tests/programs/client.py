"""Fills Redis or memcached with values nobody could guess, and digests everything that is in it.

client.py redis|memcached fill|digest PORT COUNT
"""

import hashlib
import random
import socket
import sys

kind, verb, port, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
connection = socket.create_connection(("127.0.0.1", port), timeout=30)
stream = connection.makefile("rwb", buffering=1 << 20)


def value(number):
    return random.Random(number).randbytes(4000 - number % 97)


def key(number):
    return b"key:%08d" % number


def redis(*words):
    stream.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words))


def redis_reply():
    line = stream.readline()
    if line[:1] == b"$" and line != b"$-1\r\n":
        return stream.read(int(line[1:]) + 2)[:-2]
    return line


if verb == "fill":
    for first in range(0, count, 500):
        numbers = range(first, min(first + 500, count))
        for number in numbers:
            if kind == "redis":
                redis(b"SET", key(number), value(number))
            else:
                data = value(number)
                stream.write(b"set %s 0 0 %d\r\n%s\r\n" % (key(number), len(data), data))
        stream.flush()
        for number in numbers:
            line = stream.readline()
            assert line in (b"+OK\r\n", b"STORED\r\n"), line
    print("filled")
else:
    digest = hashlib.sha256()
    for first in range(0, count, 500):
        numbers = range(first, min(first + 500, count))
        for number in numbers:
            if kind == "redis":
                redis(b"GET", key(number))
            else:
                stream.write(b"get %s\r\n" % key(number))
        stream.flush()
        for number in numbers:
            if kind == "redis":
                got = redis_reply()
            else:
                line = stream.readline()
                assert line.startswith(b"VALUE "), (number, line)
                got = stream.read(int(line.split()[3]) + 2)[:-2]
                assert stream.readline() == b"END\r\n"
            assert got == value(number), f"{key(number)} differs"
            digest.update(got)
    print(digest.hexdigest())
