"""A client of Redis that stays connected and says what becomes of its connection.

visitor.py HOST PORT KEY VALUE|-

Sets KEY to VALUE unless that is "-", and prints "connected". For each line on its standard input it then asks for KEY over
the same connection and prints the value, or "ended" when the connection is no more. "wait" waits for that end instead.
"""

import socket
import sys

host, port, key, value = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
connection = socket.create_connection((host, port), timeout=60)
stream = connection.makefile("rb")


def ask(*words):
    words = [word.encode() for word in words]
    text = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
    connection.sendall(text)
    line = stream.readline()
    if line[:1] == b"$" and line != b"$-1\r\n":
        return stream.read(int(line[1:]) + 2)[:-2].decode()
    return line.decode().strip()


if value != "-":
    assert ask("SET", key, value) == "+OK"
print("connected", flush=True)
for line in sys.stdin:
    try:
        answer = stream.readline().decode() if line == "wait\n" else ask("GET", key)
    except ConnectionError:
        answer = ""
    print(answer or "ended", flush=True)
