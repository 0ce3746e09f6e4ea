#!/bin/bash
# A shell with a pipeline beside it that checks itself and speaks as subjects do (tests/subjects/subject.h):
#   pipeline.sh --state FILE
# What is asked goes through all stages of the pipeline and comes back with what each has counted. No process is made after READY.
state=$2
say() { printf '%s\n' "$*" >>"$state"; }

coproc stages {
    sed --unbuffered 's/$/ sed/' | grep --line-buffered . | {
        count=0
        while read -r line; do
            count=$((count + 1))
            printf '%s %d\n' "$line" "$count"
        done
    }
}
# Not before every stage has answered: until then they are still being made.
echo first >&"${stages[1]}"
read -r answer <&"${stages[0]}"
[ "$answer" = "first sed 1" ] || { say "FAIL 0 the pipeline says $answer"; exit 1; }
say "READY $$ 0"
answered=0
sent=1
while true; do
    # Nothing comes: it is only a pause, without a process that sleeps.
    read -r -t 0.02 unasked <&"${stages[0]}" && say "FAIL $((answered + 1)) unasked: $unasked"
    [ -r "$state.ask" ] && read -r question <"$state.ask" || continue
    if [ "$question" = end ]; then
        exec {stages[1]}>&-
        wait "$stages_PID" || say "FAIL $((answered + 1)) the pipeline ended with $?"
        say BYE
        exit
    fi
    [ "$question" -gt "$answered" ] || continue
    answered=$question
    verdict="PASS $answered"
    for _ in 1 2 3; do
        sent=$((sent + 1))
        echo "question $question" >&"${stages[1]}"
        read -r -t 20 answer <&"${stages[0]}"
        [ "$answer" = "question $question sed $sent" ] || verdict="FAIL $question the pipeline says $answer after $sent"
    done
    say "$verdict"
done
