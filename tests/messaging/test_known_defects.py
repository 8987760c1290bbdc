"""What the communicators and brokers before this one lost, leaked or let hang: each defect by its name, not here.

``w1`` to ``w25`` are those of AiiDA's ZeroMQ broker, the others those of kiwipy over RabbitMQ and of what was built on
it: `KIWIPYS` has them with the numbers under which they were reported, or found by running it. The tests in this file
are over a real socket. Many defects are shown where they belong: killed and stopped processes and stuck peers in
`test_unix`, keys in `test_access` and `test_keys`, proofs of death in `test_liveness`, disks in ``tests/faults``, what
kiwipy's users see in ``tests/compat``.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from asyncio.subprocess import create_subprocess_exec
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import prunus
from prunus.errors import (
    CommunicatorClosedError,
    DeadLetterError,
    DuplicateSubscriberError,
    IndeterminateError,
    RemoteError,
    TaskRejectedError,
    UnroutableError,
)
from prunus.messaging import connect
from prunus.messaging.communicator import Broadcast, Communicator, IncomingTask
from prunus.messaging.peer import PeerCommunicator
from prunus.testing.communicator_contract import Inbox, echo, never
from tests.messaging.served import serving

Connect = Callable[[], Awaitable[PeerCommunicator]]

SHOWN_ELSEWHERE = {
    "w2: a process that stands still for long, and then its work is done twice": (
        "tests/messaging/test_unix.py::test_a_stopped_worker_keeps_its_work",
        "tests/messaging/test_unix.py::test_a_stopped_broker_takes_nobody_for_dead",
        "tests/messaging/test_unix.py::test_who_was_silent_for_too_long_has_lost_its_tasks",
    ),
    "w10: the tasks of a dead worker wait until another client leaves": (
        "tests/messaging/test_unix.py::test_a_killed_worker_is_replaced_within_milliseconds",
        "tests/messaging/test_unix.py::test_a_restarted_broker_knows_the_dead",
    ),
    "w13: one slow client blocks the whole broker": (
        "tests/messaging/test_unix.py::test_a_stuck_peer_stops_nobody",
        "tests/torture/fuzz/test_fuzz.py::test_a_hundred_peers_that_never_read_stop_nobody",
    ),
    "w15: no fsync; what a power cut tears is deleted; a full disk is only logged": (
        "tests/torture/disk/test_disk.py::test_no_power_cut_takes_back_what_was_confirmed",
        "tests/messaging/test_exchange.py::test_a_damaged_body_is_a_dead_letter",
        "tests/messaging/test_unix.py::test_a_full_disk_refuses_new_tasks_only",
    ),
    "w16: two brokers on one folder": ("tests/runtime/test_locks.py::test_a_second_holder_is_refused",),
    "w17: a number of a process that was used again is taken for a broker": (
        "tests/runtime/test_locks.py::test_an_old_file_with_a_reused_pid_is_no_holder",
        "tests/messaging/test_liveness.py::test_who_is_dead_already_is_told",
    ),
    "w18: what a task costs grows with the number of those that wait": (
        "tests/messaging/test_queues.py::test_a_dispatch_does_not_look_at_what_waits",
    ),
    "w23: no limits, no metrics": (
        "tests/messaging/test_queues.py::test_length_of_a_queue",
        "tests/messaging/test_exchange.py::test_sessions_and_subscriptions_have_a_bound",
        "tests/messaging/test_exchange.py::test_statistics_are_told",
    ),
    "w24: one host only": ("tests/messaging/test_network.py::test_several_places",),
}
"""Defects of AiiDA's broker that other tests show not to be here, each where it belongs."""

CONTRACT = "src/prunus/testing/communicator_contract.py"
KIWIPYS = {
    # tasks that are lost, and processes that nobody reaches
    "a task vanishes after seven days, in progress or not; a requeue does not reset the clock (kiwipy#57, #59, #92, "
    "#93)": (
        "test_kiwipy_ttl_no_task_has_a_time_limit_of_its_own",
        "tests/messaging/test_queues.py::test_no_task_expires_by_itself",
    ),
    "a broker that restarts loses tasks (kiwipy#29, aiida#2957, #2958)": (
        "tests/compat/test_kiwipy.py::test_the_broker_is_killed",
        "tests/guarantees/test_g01_accepted_means_stored.py::test_every_message_survives_the_death_of_its_broker",
    ),
    "a process is active and has no task, or a task has no process (aiida#1712, #4289, #5676, #5677, #5699, #6015, "
    "#6194, #2443, #2445, #1332, #893)": (
        "tests/guarantees/test_g12_nothing_is_forgotten.py::test_processes_whose_tasks_were_deleted_by_hand_complete",
        "tests/guarantees/test_g12_nothing_is_forgotten.py::test_a_process_that_nobody_was_told_of_is_found",
        "tests/guarantees/test_g02_acked_means_ended_or_parked.py"
        "::test_after_every_commit_each_process_is_ended_watched_or_parked",
        "tests/runtime/test_worker.py::test_a_task_about_no_process_is_not_lost",
    ),
    "who is not held by a worker can't be killed (aiida#1712)": (
        "tests/runtime/test_controller.py::test_a_parked_process_is_paused_played_and_killed_without_a_holder",
        "tests/faults/test_classes.py::test_a_class_that_is_gone_can_be_killed_all_the_same",
    ),
    "after missed heart-beats a worker gets the task that it has, or two have it; its late acknowledgement is dropped, "
    "or deletes the only task (aiida#3973, #4598, #5715, #1748)": (
        "tests/messaging/test_unix.py::test_a_lost_connection_is_not_the_end_of_a_session",
        "tests/compat/test_kiwipy.py::test_the_broker_is_started_anew",
        "tests/messaging/test_broker.py::test_only_the_holder_settles_and_only_now",
        "tests/guarantees/test_g04_one_writer_per_process.py"
        "::test_a_worker_that_was_taken_for_dead_does_not_write_any_more",
    ),
    "a task that is held for more than half an hour is taken away, and its work done twice (aiida#5105, #5106, #5317, "
    "#6189)": (
        "tests/messaging/test_queues.py::test_no_task_expires_by_itself",
        "tests/messaging/test_unix.py::test_a_stopped_worker_keeps_its_work",
    ),
    "a cancelled future ends the communicator's thread, and a child stays CREATED (aiida#5219, #1818, #2158)": (
        "test_kiwipy_who_stopped_waiting_breaks_nothing",
        "tests/compat/test_kiwipy.py::test_a_future_that_nobody_wants_any_more",
        "tests/guarantees/test_g12_nothing_is_forgotten.py::test_what_somebody_claimed_and_left_goes_to_others",
    ),
    "after a restart of the broker a task is unroutable (aiida#7152)": (
        "test_w1_a_restarted_broker_strands_nobody",
        "tests/compat/test_kiwipy.py::test_the_broker_is_started_anew",
    ),
    "a process whose class can't be imported is stuck, its task gone (aiida#3407)": (
        "tests/faults/test_classes.py::test_it_is_set_aside_and_goes_on_when_mended",
    ),
    # slots, scheduling, throughput
    "waiting parents hold all slots (aiida#1397, #6561, #4595, #4902)": (
        "tests/guarantees/test_g11_waiting_is_free.py::test_many_waiting_parents_and_one_slot",
        "tests/runtime/test_complaints.py::test_nested_workflows_do_not_starve_each_other",
    ),
    "no limits and no priorities (aiida#5596, #3366, #1431, #88, workgraph#22, #275, #459, #460)": (
        "tests/messaging/test_queues.py::test_concurrency_of_a_queue",
        "tests/messaging/test_queues.py::test_tokens_of_a_resource",
        "tests/messaging/test_queues.py::test_rate_of_a_queue",
        "tests/messaging/test_queues.py::test_the_highest_priority_first_and_the_oldest_within_one",
    ),
    "`task_queue` leaves two channels; the 1,024th call fails (workgraph#462, #463, #466)": (
        "tests/compat/test_kiwipy.py::test_queues_cost_nothing",
        "test_kiwipy_nothing_leaks",
    ),
    "many submissions time out, and more workers make it worse (aiida#3540, #4841, #4745, #5756, plumpy#207 to #212)": (
        "tests/runtime/test_complaints.py::test_many_submissions_at_once_are_all_accepted",
        "test_w3_no_send_is_dropped",
    ),
    "a missed broadcast costs a minute, an early one shows the past (aiida#4150, #4151, #4154, #1391, #6598)": (
        "tests/guarantees/test_g03_nothing_leaves_ahead_of_the_checkpoint.py::test_what_is_heard_is_committed_already",
        "tests/runtime/test_controller_watch.py::test_it_needs_no_broadcast",
        f"{CONTRACT}::test_who_is_slow_is_told_what_it_missed",
    ),
    "finished processes stay in memory (aiida#4603, #4698, #4699)": (
        "tests/processes/test_listeners.py::test_ten_thousand_finished_processes_leave_no_object_alive",
        "tests/processes/test_stack.py::test_a_leaked_context_keeps_no_process_alive",
    ),
    "nested calls, or futures in a chain, end in a RecursionError (aiida#4876, #6044, #6052)": (
        "tests/processes/test_call.py::test_calls_are_nested_as_deep_as_memory_allows",
        "tests/processes/test_execute.py::test_children_run_beside_their_parent_to_any_depth",
        "tests/compat/test_kiwipy.py::test_a_future_of_itself",
    ),
    "there is no way to send and forget (aiida#2082)": (
        "tests/compat/test_kiwipy.py::test_no_reply",
        "test_w4_a_script_that_sends_and_ends_loses_nothing",
    ),
    # what is awkward in kiwipy, from 1 to 11
    "k1: a call in a subscriber waits for itself until its time is over": (
        "tests/compat/test_kiwipy.py::test_calls_in_subscribers",
        "tests/compat/test_kiwipy.py::test_calls_in_callbacks_of_futures",
        "tests/compat/test_kiwipy.py::test_coroutines_may_subscribe",
        "tests/messaging/test_blocking.py::test_where_it_would_wait_for_itself_it_raises_at_once",
    ),
    "k2: subscribers run in the communicator's thread; futures in futures lose cancellations": (
        "test_w22_a_handler_that_blocks_stops_nobody_else",
        "test_kiwipy_every_delivery_has_exactly_one_answer",
        "tests/compat/test_kiwipy.py::test_a_cancelled_future_cancels_the_callers",
        "tests/guarantees/test_g08_one_await_one_fact.py::test_a_communicator_answers_with_facts",
        "tests/messaging/test_client.py::test_memory_has_a_bound",
    ),
    "k3: rejected tasks turn in a hot loop, uncounted; there are no dead letters; what can't be decoded is stuck": (
        "test_w11_a_task_that_all_reject_is_no_hot_loop",
        "tests/messaging/test_queues.py::test_after_max_attempts_a_task_is_dead_with_the_last_reason",
        "tests/compat/test_kiwipy.py::test_a_task_that_nobody_here_wants",
        "tests/compat/test_kiwipy.py::test_a_task_that_can_not_be_decoded_and_that_nobody_waits_for",
    ),
    "k4: a fetched task goes back when memory is collected, and its outcome is that of another thread's loop": (
        f"{CONTRACT}::test_next_task_settles_as_it_is_told",
        f"{CONTRACT}::test_an_exception_gives_a_fetched_task_back",
        "tests/compat/test_kiwipy.py::test_an_outcome_that_was_forgotten",
        "tests/compat/test_kiwipy.py::test_next_task",
    ),
    "k5: channels, queues of RPC subscribers and entries of unroutable questions leak": (
        "test_kiwipy_nothing_leaks",
        "tests/compat/test_kiwipy.py::test_nothing_is_kept_of_what_is_over",
    ),
    "k6: YAML by default, which is slow, and makes objects": (
        "tests/compat/test_kiwipy.py::test_the_default_codec_is_ours",
        "tests/compat/test_codec.py::test_anything_else_is_refused",
        "tests/compat/test_codec.py::test_other_bytes_are_a_value_error",
    ),
    "k7: filters match beginnings, and everybody gets everything": (
        "tests/messaging/test_patterns.py::test_it_is_the_same_as_word_by_word",
        "tests/messaging/test_patterns.py::test_a_name_without_wildcards_matches_itself_alone",
        "tests/compat/test_wire.py::test_what_the_broker_can_decide_it_decides",
        "tests/compat/test_kiwipy.py::test_filters",  # kiwipy's own, as they are (kiwipy#103: untested there)
    ),
    "k8: identifiers are sometimes texts only": ("tests/compat/test_kiwipy.py::test_identifiers",),
    "k9: what was once said of a queue can't be changed": (
        "tests/messaging/test_queues.py::test_tokens_can_be_changed_while_it_runs",
        "tests/messaging/test_queues.py::test_what_is_configured_lasts",
        "tests/messaging/test_taskstore.py::test_tables_of_the_first_version_are_upgraded",
    ),
    "k10: one RPC identifier on two connections: both are asked": (
        "test_w8_a_name_can_not_be_taken_over",
        "tests/compat/test_kiwipy.py::test_an_identifier_is_one_subscribers_on_all_communicators",
    ),
    "k11: local, RabbitMQ and ZeroMQ differ in their errors: here all pass one contract": (
        "tests/messaging/test_local.py::TestLocalCommunicator",
        "tests/messaging/test_unix.py::TestUnixCommunicator",
        "tests/messaging/test_network.py::TestCurveCommunicator",
        f"{CONTRACT}::test_nobody_listens",
        f"{CONTRACT}::test_errors_of_an_answerer_cross_as_data",
    ),
    # found by running it
    "RPC: acknowledged before it is answered, so that who asks a dying peer waits for ever": (
        "test_w7_a_question_whose_recipient_goes_ends_at_once_and_leaves_nothing",
        "tests/compat/test_kiwipy.py::test_who_was_asked_is_gone",
    ),
    "RPC: what can't be decoded, or encoded, is never answered": (
        "tests/compat/test_kiwipy.py::test_what_can_not_be_decoded",
        "tests/compat/test_kiwipy.py::test_a_result_that_can_not_be_sent",
    ),
    "RPC: of an error there is only the text, or a tuple of objects": (
        "test_w6_errors_keep_their_type",
        "tests/compat/test_kiwipy.py::test_a_remote_error_has_all_of_it",
    ),
    "RPC: a question that waits for more than a minute is dropped in silence": (
        f"{CONTRACT}::test_a_question_has_an_end",
        "tests/compat/test_kiwipy.py::test_one_at_a_time_and_in_order",
    ),
    "RPC: an answer that nobody fetches within a minute is gone": (
        "tests/messaging/test_client.py::test_an_answer_while_disconnected",
        "tests/messaging/test_broker.py::test_a_result_waits_until_it_is_seen",
    ),
    "RPC: a subscription that took too long may be there all the same, and belongs to nobody (aiida#4595)": (
        "tests/compat/test_kiwipy.py::test_a_subscription_that_took_too_long_is_none",
    ),
    "RPC: a subscriber of tasks is refused because of one of questions": (
        "tests/compat/test_kiwipy.py::test_one_identifier_for_different_things",
    ),
    "broadcasts: one that comes while subscriptions change is missed": (
        "test_kiwipy_subscribing_while_a_broadcast_is_dealt_with",
    ),
    "broadcasts: one slow subscriber holds up the others, one that fails raises where it was sent": (
        "tests/compat/test_kiwipy.py::test_a_slow_subscriber_holds_up_nobody",
        f"{CONTRACT}::test_a_listener_that_fails_or_leaves",
    ),
    "broadcasts: who did not listen for a minute misses them, and does not know": (
        f"{CONTRACT}::test_who_is_slow_is_told_what_it_missed",
        "tests/messaging/test_exchange.py::test_broadcasts_that_were_missed_are_told",
    ),
    "tasks: after a subscriber that raised the next one gets it too": (
        "test_kiwipy_one_task_runs_once_in_one_subscriber",
        "tests/compat/test_kiwipy.py::test_an_error_ends_a_task",
    ),
    "tasks: a cancelled one is neither done nor given back": (
        "test_w12_cancelled_handlers_free_their_places",
        "tests/compat/test_kiwipy.py::test_a_task_that_nobody_here_wants",
    ),
    "tasks: one without a queue is refused, one that nobody accepts is never answered": (
        "tests/compat/test_kiwipy.py::test_a_task_waits_for_somebody",
        f"{CONTRACT}::test_a_task_that_nobody_can_do_is_a_dead_letter",
    ),
    "tasks: one that is fetched, processed and cancelled is stuck": (
        "tests/compat/test_kiwipy.py::test_a_task_that_was_not_processed_goes_back",
    ),
    "tasks: an empty queue is not waited for": (
        "tests/compat/test_kiwipy.py::test_an_empty_queue",
        "tests/compat/test_kiwipy.py::test_a_task_comes_while_somebody_waits",
    ),
    "tasks: looking into a queue holds all of it": (
        "test_w14_looking_into_a_queue_changes_nothing",
        "tests/compat/test_kiwipy.py::test_iterating",
    ),
    "tasks: one worker takes as many as there are": ("test_w9_the_first_worker_does_not_take_the_whole_backlog",),
    "tasks: one that is in progress when its communicator is closed is done twice": (
        "tests/compat/test_kiwipy.py::test_a_task_that_is_being_done_when_the_communicator_is_closed",
    ),
    "tasks: no delays, no deadlines, no counter of attempts": (
        f"{CONTRACT}::test_a_task_is_not_delivered_before_its_time",
        f"{CONTRACT}::test_a_task_that_expired_is_a_dead_letter",
        f"{CONTRACT}::test_a_task_that_nobody_can_do_is_a_dead_letter",
    ),
    "tasks: one that could not be sent is said to be rejected": (
        "tests/compat/test_kiwipy.py::test_a_task_that_is_not_taken",
    ),
    "all: a subscriber gets the part that called it, and not its communicator": (
        "tests/compat/test_kiwipy.py::test_a_question_and_its_answer",
    ),
    "all: bytes of a stranger are an AssertionError": (
        "tests/compat/test_wire.py::test_other_bytes_are_a_protocol_error",
    ),
    "all: without RabbitMQ's libraries nothing can be imported": (
        "tests/compat/test_kiwipy.py::test_nothing_of_rabbitmq_is_needed",
    ),
    "the end: after `close` there are attributes missing, and whoever waits waits for ever": (
        "tests/compat/test_kiwipy.py::test_after_close_there_is_nothing",
        "tests/compat/test_kiwipy.py::test_closing",
    ),
    "the end: each disconnection takes its whole time-out (aiida#6673)": (
        "test_kiwipy_the_end_of_a_communicator_does_not_wait_for_others",
    ),
    "threads: heart-beats stop while the interpreter is held (aiida#3973)": (
        "tests/messaging/test_unix.py::test_a_stopped_worker_keeps_its_work",
        "tests/runtime/test_watchdog.py::test_a_block_keeps_the_claim",
    ),
    "threads: the local communicator calls subscribers where one sends, and knows no locks": (
        "tests/messaging/test_local.py::TestLocalCommunicator",
        "tests/messaging/test_blocking.py::test_many_threads_at_once",
        "tests/compat/test_kiwipy.py::test_many_threads",
    ),
    "threads: a SystemExit of a subscriber ends the communicator": (
        "tests/compat/test_kiwipy.py::test_errors_that_end_others",
    ),
}
"""Defects of kiwipy, and of what was built on it, each with the tests that show that it is not here. A name without a
file is one in this file."""

NONE_OF_OURS = {
    "exchanges that are not durable, names and arguments of RabbitMQ's queues": "there is no RabbitMQ: what is stored "
    "is in one database, whose tables are upgraded",
    "a queue whose arguments were changed refuses the connection": "nothing is declared by those who connect",
    "`kiwipy.Communicator` can be instantiated though its methods are abstract": "it is kiwipy's class; ours is a "
    "protocol, and a type checker says what is missing",
    "`capture_exceptions` passes a BaseException on, and `EventHelper` is used by nobody": "both are kiwipy's own, and "
    "not used here",
}
"""Defects that can't be here, and why."""


def test_every_named_defect_has_its_test() -> None:
    """W1 to W25 and K1 to K11, here or where the tables say; and the tests that these name exist."""
    root = Path(__file__).parents[2]
    for tests in (SHOWN_ELSEWHERE | KIWIPYS).values():
        for test in tests:
            file, _, name = test.rpartition("::")
            text = (root / file if file else Path(__file__)).read_text(encoding="utf-8")
            assert f"def {name}(" in text or f"class {name}(" in text, test
    here = {name.split("_")[1] for name in globals() if name.startswith("test_w")}
    elsewhere = {name.partition(":")[0] for name in SHOWN_ELSEWHERE | KIWIPYS}
    numbered = {f"w{number}" for number in range(1, 26)} | {f"k{number}" for number in range(1, 12)}
    assert numbered <= here | elsewhere


@pytest.fixture
def endpoint(short_folder: Path) -> str:
    return f"ipc://{short_folder}/run/s"


@pytest.fixture
def broker(endpoint: str) -> Iterator[None]:
    with serving(endpoint):
        yield


@pytest.fixture
async def peers(endpoint: str, broker: None) -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        async def new() -> PeerCommunicator:
            return await stack.enter_async_context(await connect(endpoint))

        yield new


# --- AiiDA's ZeroMQ broker ---


async def test_w1_a_restarted_broker_strands_nobody(endpoint: str, short_folder: Path) -> None:
    """Clients reconnected to a path that was gone, and nobody subscribed again: tasks, questions and broadcasts were
    for nobody until every client was restarted."""
    database = str(short_folder / "broker.db")
    inbox, heard = Inbox(), asyncio.Queue[Broadcast]()
    async with AsyncExitStack() as stack:
        with serving(endpoint, database):
            sender = await stack.enter_async_context(await connect(endpoint))
            worker = await stack.enter_async_context(await connect(endpoint))
            await worker.add_task_subscriber(inbox, credit=2)
            await worker.add_rpc_subscriber(echo, "echo")
            await worker.add_broadcast_subscriber(heard.put)
            early = await sender.task_send(b"before", want_result=True)
            held = await inbox.next()
        up = asyncio.Event()
        worker.on_reconnect(up.set)
        waiting = asyncio.create_task(sender.task_send(b"meanwhile"))
        with serving(endpoint, database):
            await waiting
            assert (await inbox.next()).body == b"meanwhile"
            assert await sender.rpc_send("echo", b"x") == b"x"
            await up.wait()
            await sender.broadcast_send(b"news")
            assert (await heard.get()).body == b"news"
            inbox.ack(held, b"done")
            assert await early.result() == b"done"
            await asyncio.gather(sender.close(), worker.close())


async def test_w3_no_send_is_dropped(peers: Connect) -> None:
    """Of 5,000 sends at once up to 37 % vanished without an error: a full queue in ZeroMQ was never looked at."""
    sender = await peers()
    receipts = await asyncio.gather(*(sender.task_send(b"x" * 300) for _ in range(5000)))
    assert len({receipt.id for receipt in receipts}) == 5000
    assert (await sender.statistics()).queues["default"].ready == 5000


async def test_w4_a_script_that_sends_and_ends_loses_nothing(endpoint: str, broker: None, peers: Connect) -> None:
    """`close` right behind `task_send` threw away what was not yet on the wire."""
    program = (
        "import sys; from prunus.messaging import connect_sync\n"
        "with connect_sync(sys.argv[1]) as communicator:\n"
        "    for number in range(10): communicator.task_send(b'%d' % number)\n"
    )
    path = {**os.environ, "PYTHONPATH": str(Path(prunus.__file__).parents[1])}
    script = await create_subprocess_exec(sys.executable, "-c", program, endpoint, env=path)
    assert await script.wait() == 0
    found = await (await peers()).tasks("default", bodies=True)
    assert [task.body for task in found] == [b"%d" % number for number in range(10)]


async def test_w4_a_send_that_is_cut_off_by_close_is_not_silent(peers: Connect) -> None:
    """Each of them was stored, or raised."""
    sender, other = await peers(), await peers()
    sending = [asyncio.create_task(sender.task_send(b"%d" % number)) for number in range(100)]
    await asyncio.sleep(0)
    await sender.close()
    outcomes = await asyncio.gather(*sending, return_exceptions=True)
    stored = [outcome.id for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert {type(outcome) for outcome in outcomes if isinstance(outcome, BaseException)} <= {CommunicatorClosedError}
    assert {task.id for task in await other.tasks("default")} >= set(stored)


async def test_w5_a_client_with_nothing_but_a_broadcast_subscription_hears(peers: Connect) -> None:
    """Broadcasts went to those only who had a task or RPC subscription as well."""
    speaker, listener = await peers(), await peers()
    heard: asyncio.Queue[Broadcast] = asyncio.Queue()
    await listener.add_broadcast_subscriber(heard.put, subject="state_changed.#")
    await speaker.broadcast_send(b"1", subject="state_changed.running.finished")
    assert (await heard.get()).body == b"1"


async def test_w6_errors_keep_their_type(peers: Connect) -> None:
    """Each error came as a bare ``Exception(str)``; an unknown recipient was not `UnroutableError`."""
    asker, answerer = await peers(), await peers()

    async def fail(body: bytes) -> bytes:
        raise LookupError("which?")

    await answerer.add_rpc_subscriber(fail, "fail")
    with pytest.raises(RemoteError) as error:
        await asker.rpc_send("fail", b"")
    assert (error.value.failure.type, error.value.failure.message) == ("LookupError", "which?")
    assert "in fail" in error.value.failure.traceback
    with pytest.raises(UnroutableError):
        await asker.rpc_send("nobody", b"")


async def test_w7_a_question_whose_recipient_goes_ends_at_once_and_leaves_nothing(peers: Connect) -> None:
    """The caller waited for its whole time, and the broker kept the question for ever."""
    asker, answerer = await peers(), await peers()
    asked = asyncio.Event()

    async def hang(body: bytes) -> bytes:
        asked.set()
        return await never(body)

    await answerer.add_rpc_subscriber(hang, "hang")
    question = asyncio.create_task(asker.rpc_send("hang", b"", timeout_s=1000))
    await asked.wait()
    assert (await asker.statistics()).questions == 1
    await answerer.close()
    with pytest.raises(IndeterminateError):
        await question
    assert (await asker.statistics()).questions == 0


async def test_w8_a_name_can_not_be_taken_over(peers: Connect) -> None:
    """A second client got the name silently, and lost it when the first one unsubscribed."""
    first, second = await peers(), await peers()
    subscription = await first.add_rpc_subscriber(echo, "name")
    with pytest.raises(DuplicateSubscriberError):
        await second.add_rpc_subscriber(echo, "name")
    await subscription.cancel()
    await second.add_rpc_subscriber(echo, "name")
    await subscription.cancel()
    assert await first.rpc_send("name", b"x") == b"x"


async def test_w9_the_first_worker_does_not_take_the_whole_backlog(peers: Connect) -> None:
    """It got all 500 tasks, or 200 of them; a worker that was added later stood idle."""
    sender, first, second = await peers(), await peers(), await peers()
    early, late = Inbox(), Inbox()
    await first.add_task_subscriber(early, credit=4)
    await asyncio.gather(*(sender.task_send(b"") for _ in range(20)))
    for _ in range(4):
        await early.next()
    await second.add_task_subscriber(late, credit=4)
    for _ in range(4):
        await late.next()
    assert early.came.empty()
    assert (await sender.statistics()).queues["default"].ready == 12


async def test_w11_a_task_that_all_reject_is_no_hot_loop(peers: Connect) -> None:
    """It was offered 1,800 times a second for ever; kiwipy's 328 times. Here it waits longer after each rejection, and
    ends as a dead letter with its reason where that was asked for."""
    sender, worker = await peers(), await peers()
    attempts: list[int] = []

    async def reject(task: IncomingTask) -> None:
        attempts.append(task.attempt)
        raise TaskRejectedError("not mine")

    await worker.add_task_subscriber(reject)
    receipt = await sender.task_send(b"poison", max_attempts=3, want_result=True)
    await sender.task_send(b"for ever", queue="elsewhere")
    task = await worker.next_task(queue="elsewhere")
    await task.reject("nor mine")
    [waiting] = await sender.tasks("elsewhere")
    assert (waiting.place, waiting.reason) == ("delayed", "nor mine")
    with pytest.raises(DeadLetterError, match="not mine"):
        await receipt.result()
    assert attempts == [1, 2, 3]


async def test_w11_a_rejection_is_no_acknowledgement(peers: Connect) -> None:
    """`TaskRejected` out of a coroutine counted as done: the task was lost. An error is told to the sender instead."""
    sender, worker = await peers(), await peers()
    inbox = Inbox()
    await worker.add_task_subscriber(inbox)
    receipt = await sender.task_send(b"", want_result=True)
    inbox.fail(await inbox.next(), TaskRejectedError())
    inbox.fail(await inbox.next(), ValueError("bad"))
    with pytest.raises(RemoteError, match="bad"):
        await receipt.result()


async def test_w12_cancelled_handlers_free_their_places(peers: Connect) -> None:
    """A cancelled task future was neither acknowledged nor given back: two of them, and a worker with two places
    never got anything again."""
    sender, worker = await peers(), await peers()
    inbox = Inbox()
    await worker.add_task_subscriber(inbox, credit=2)
    ids = {(await sender.task_send(b"")).id for _ in range(5)}
    for _ in range(2):
        inbox.running[(await inbox.next()).id].cancel()
    done = set()
    while done != ids:
        task = await inbox.next()
        done.add(task.id)
        inbox.ack(task)


async def test_w14_looking_into_a_queue_changes_nothing(peers: Connect) -> None:
    """Iterating it gave running tasks back, which ran again after the next restart; in kiwipy it held them all."""
    sender, worker = await peers(), await peers()
    inbox = Inbox()
    await worker.add_task_subscriber(inbox)
    receipt = await sender.task_send(b"running", want_result=True)
    await sender.task_send(b"waiting")
    running = await inbox.next()
    for _ in range(3):
        assert [task.place for task in await sender.tasks(bodies=True)] == ["held", "ready"]
    inbox.ack(running, b"once")
    assert await receipt.result() == b"once"
    assert (await inbox.next()).body == b"waiting"
    assert (await sender.statistics()).delivered == 2


async def test_w19_results_come_back(peers: Connect) -> None:
    """The sender of a task got ``True``, whatever its worker returned."""
    peer = await peers()

    async def double(task: IncomingTask) -> bytes:
        return task.body * 2

    await peer.add_task_subscriber(double)
    assert await (await peer.task_send(b"ab", want_result=True)).result() == b"abab"


async def test_w20_tasks_that_come_back_keep_their_order(peers: Connect) -> None:
    """They came back in reverse; and the order was that of the wall clock."""
    sender, first, second = await peers(), await peers(), await peers()
    inbox = Inbox()
    await first.add_task_subscriber(inbox, credit=5)
    for number in range(8):
        await sender.task_send(b"%d" % number)
    for _ in range(5):
        await inbox.next()
    await first.close()
    theirs = Inbox()
    await second.add_task_subscriber(theirs, credit=8)
    assert [(await theirs.next()).body for _ in range(8)] == [b"%d" % number for number in range(8)]


async def test_w21_nobody_settles_what_another_holds(peers: Connect) -> None:
    """Any client could acknowledge any task."""
    sender, worker, thief = await peers(), await peers(), await peers()
    inbox = Inbox()
    await worker.add_task_subscriber(inbox)
    receipt = await sender.task_send(b"", want_result=True)
    task = await inbox.next()
    await thief.call([], acks=[task])
    [info] = await sender.tasks(task=task.id)
    assert info.holder == worker.session
    inbox.ack(task, b"by its holder")
    assert await receipt.result() == b"by its holder"


async def test_w22_a_handler_that_blocks_stops_nobody_else(peers: Connect) -> None:
    """Handlers ran on the loop of the socket: one that blocked stopped acknowledgements and heart-beats too. Here
    not even an ``async def`` that blocks its own loop does."""
    peer, asker = await peers(), await peers()
    blocked, go_on = threading.Event(), threading.Event()

    async def block(body: bytes) -> bytes:
        blocked.set()
        go_on.wait()
        return body

    async def elsewhere() -> bytes:
        await peer.add_rpc_subscriber(block, "block")
        return await peer.rpc_send("block", b"at last", timeout_s=1000)

    await peer.add_rpc_subscriber(echo, "echo")
    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, elsewhere()))
    await asyncio.to_thread(blocked.wait)
    assert await asker.rpc_send("echo", b"x") == b"x"
    assert (await peer.task_send(b"")).stored
    go_on.set()
    assert await thread == b"at last"


async def test_w25_the_broker_may_stop_first(endpoint: str) -> None:
    """At a shutdown broker and workers were stopped together, and a worker's good-bye met nobody: `close` ends all the
    same, with handlers cancelled."""
    inbox = Inbox()
    with serving(endpoint):
        worker = await connect(endpoint)
        await worker.add_task_subscriber(inbox)
        await worker.task_send(b"")
        handler = inbox.running[(await inbox.next()).id]
    await worker.close()
    await asyncio.wait([handler])
    assert handler.cancelled()


# --- kiwipy, and what was built on it ---


async def test_kiwipy_ttl_no_task_has_a_time_limit_of_its_own(peers: Connect) -> None:
    """Tasks vanished after seven days (kiwipy#57, #59, #92): also those in progress, when their worker stopped."""
    sender = await peers()
    await sender.task_send(b"")
    [task] = await sender.tasks()
    assert (task.expires_at, task.max_attempts) == (None, 0)


async def test_kiwipy_one_task_runs_once_in_one_subscriber(peers: Connect) -> None:
    """After a subscriber that raised, the next one of the same client got the task as well (a missing ``break``)."""
    peer = await peers()
    handled: list[str] = []

    def subscriber(name: str) -> Callable[[IncomingTask], bytes]:
        def fail(task: IncomingTask) -> bytes:
            handled.append(name)
            raise ValueError(name)

        return fail

    for name in ("first", "second"):
        await peer.add_task_subscriber(subscriber(name))
    receipt = await peer.task_send(b"", want_result=True)
    with pytest.raises(RemoteError, match="ValueError"):
        await receipt.result()
    assert len(handled) == 1


async def test_kiwipy_subscribing_while_a_broadcast_is_dealt_with(peers: Connect) -> None:
    """A handler that added or removed a subscription made later subscribers miss the broadcast."""
    peer = await peers()
    heard: asyncio.Queue[str] = asyncio.Queue()
    subscriptions = []

    async def change(broadcast: Broadcast) -> None:
        await peer.add_broadcast_subscriber(lambda _: None)
        await subscriptions[0].cancel()
        heard.put_nowait("first")

    async def listen(broadcast: Broadcast) -> None:
        heard.put_nowait("second")

    subscriptions.append(await peer.add_broadcast_subscriber(change))
    await peer.add_broadcast_subscriber(listen)
    await peer.broadcast_send(b"")
    assert {await heard.get(), await heard.get()} == {"first", "second"}


async def test_kiwipy_every_delivery_has_exactly_one_answer(peers: Connect) -> None:
    """An undecodable message, an un-encodable result or a cancellation left the caller without an answer, or the task
    without an owner."""
    peer = await peers()

    async def answer(argument: object) -> bytes:
        body = argument if isinstance(argument, bytes) else argument.body  # type: ignore[attr-defined]
        match body:
            case b"result":
                return b"fine"
            case b"unsendable":
                return object()  # type: ignore[return-value]
            case b"exception":
                raise ValueError("bad")
            case _:
                raise asyncio.CancelledError

    await peer.add_rpc_subscriber(answer, "me")
    await peer.add_task_subscriber(answer)
    assert await peer.rpc_send("me", b"result") == b"fine"
    for body, kind in ((b"unsendable", "TypeError"), (b"exception", "ValueError"), (b"cancelled", "CancelledError")):
        with pytest.raises(RemoteError, match=kind):
            await peer.rpc_send("me", body)
    for body, kind in ((b"unsendable", "TypeError"), (b"exception", "ValueError")):
        with pytest.raises(RemoteError, match=kind):
            await (await peer.task_send(body, want_result=True)).result()
    receipt = await peer.task_send(b"cancelled", want_result=True, max_attempts=2)
    with pytest.raises(DeadLetterError, match="cancelled"):
        await receipt.result()


async def test_kiwipy_nothing_leaks(peers: Connect) -> None:
    """Task queues kept their channels (workgraph#463: the 1,024th failed), RPC subscriptions their queues, questions to
    nobody their entry: after a thousand of each there is nothing left, here and at the broker."""
    peer = await peers()

    async def one(number: int) -> None:
        subscription = await peer.add_rpc_subscriber(echo, f"name {number}")
        await subscription.cancel()
        with pytest.raises(UnroutableError):
            await peer.rpc_send(f"name {number}", b"")
        with pytest.raises(TimeoutError):
            await peer.next_task(queue=f"queue {number}", timeout_s=0)
        listener = await peer.add_broadcast_subscriber(echo, subject=f"s{number}")  # type: ignore[arg-type]
        await listener.cancel()

    for start in range(0, 1000, 100):
        await asyncio.gather(*(one(number) for number in range(start, start + 100)))
    numbers = await peer.statistics()
    mine = numbers.sessions[peer.session]
    assert (mine.subscriptions, mine.credit, mine.questions, mine.held) == (0, 0, 0, 0)
    assert (numbers.questions, numbers.identifiers, numbers.broadcast_subscriptions) == (0, 0, 0)
    assert not peer._waiters
    assert not peer._deliveries.lanes
    assert not peer._deliveries.rpcs
    assert not peer._deliveries.broadcasts
    assert not len(peer._jobs)


async def test_kiwipy_who_stopped_waiting_breaks_nothing(peers: Connect) -> None:
    """The answer to a future that was cancelled raised in the communicator's thread (aiida-core#2158)."""
    asker, answerer = await peers(), await peers()
    go_on = asyncio.Event()

    async def late(body: bytes) -> bytes:
        await go_on.wait()
        return body

    await answerer.add_rpc_subscriber(late, "late")
    questions = [asyncio.create_task(asker.rpc_send("late", b"", timeout_s=1000)) for _ in range(10)]
    await asker.call([])
    for question in questions:
        question.cancel()
    await asyncio.wait(questions)
    go_on.set()
    assert await asker.rpc_send("late", b"x") == b"x"
    assert not asker._waiters


async def test_kiwipy_the_end_of_a_communicator_does_not_wait_for_others(peers: Connect) -> None:
    """Each disconnect took its whole time-out (aiida-core#6673). Here they leave together."""
    leaving: list[Communicator] = [await peers() for _ in range(20)]
    other = await peers()
    await asyncio.gather(*(peer.close() for peer in leaving))
    assert list((await other.statistics()).sessions) == [other.session]
