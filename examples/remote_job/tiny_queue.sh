#!/bin/sh
# A batch system of forty lines, for hosts that have none. A job is the file job.sh in a folder of its own.
#
#   tiny_queue.sh submit FOLDER NAME   begin the job, once: whoever submits this name again gets the same job
#   tiny_queue.sh find FOLDER NAME     print the id of the job, or end with status 3 if nobody has submitted it
#   tiny_queue.sh status FOLDER        running | done STATUS | cancelled | lost
#   tiny_queue.sh cancel FOLDER        end what runs there, and let nothing begin any more
#
# The id of a job is the number of its process group. What it says goes to the files output and errors.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
command=$1
cd "$2"
case $command in
submit)
    setsid sh "$here/tiny_queue.sh" begin "$PWD" "$3" > /dev/null 2>&1 < /dev/null &
    tries=0
    until [ -e "job-$3" ]; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || { echo "the job $3 has not begun" >&2; exit 1; }
        sleep 0.05
    done
    cat "job-$3"
    ;;
begin)
    echo $$ > ".id-$$"
    ln ".id-$$" "job-$3" || { rm ".id-$$"; exit 0; } # somebody else has begun this job: a link is made once
    rm ".id-$$"
    [ ! -e cancelled ] || exit 0 # (whoever cancels makes this file first, and looks for jobs then)
    echo "$$ $3" >> "$here/tiny_queue.log"
    status=0
    sh job.sh > output 2> errors < /dev/null || status=$?
    echo $status > ".exit-$$"
    mv ".exit-$$" exit
    ;;
find)
    cat "job-$3" 2> /dev/null || exit 3
    ;;
status)
    if [ -e exit ]; then
        echo "done $(cat exit)"
    elif [ -e cancelled ]; then
        echo cancelled
    elif kill -0 "$(cat job-*)" 2> /dev/null; then
        echo running
    else
        sleep 0.2 # it may have ended while we looked
        if [ -e exit ]; then echo "done $(cat exit)"; else echo lost; fi
    fi
    ;;
cancel)
    : > cancelled
    for job in job-*; do
        [ -e "$job" ] || continue
        group=$(cat "$job")
        kill -s TERM -- "-$group" 2> /dev/null || continue # it has ended
        sleep 0.2
        kill -s KILL -- "-$group" 2> /dev/null || :
    done
    ;;
*)
    echo "tiny_queue.sh knows no $command" >&2
    exit 2
    ;;
esac
