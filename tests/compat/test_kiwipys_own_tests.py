"""The tests that kiwipy keeps for its thread communicator, each with the one here that shows the same.

They are not part of kiwipy's distribution; their names are those of its repository. In place of theirs, which want a
RabbitMQ, those of `test_kiwipy` ask for the same and, mostly, for more: other threads, other communicators, every
future.
"""

from __future__ import annotations

from tests.compat import test_kiwipy

OF_EVERY_COMMUNICATOR = {
    "test_close": "test_after_close_there_is_nothing",
    "test_rpc_send_receive": "test_a_question_and_its_answer",
    "test_add_remove_rpc_subscriber": "test_rpc_subscribers_come_and_go",
    "test_rpc_nested_futrues": "test_futures_in_futures",
    "test_rpc_exception": "test_an_error_after_futures",
    "test_rpc_unroutable": "test_nobody_listens",
    "test_task_send": "test_a_task_waits_for_somebody",
    "test_future_task": "test_futures_in_futures",
    "test_task_exception": "test_an_error_ends_a_task",
    "test_task_no_reply": "test_no_reply",
    "test_add_remove_task_subscriber": "test_task_subscribers_come_and_go",
    "test_broadcast_send": "test_a_broadcast",
    "test_broadcast_filter_subject": "test_filters",
    "test_broadcast_filter_sender": "test_filters",
    "test_broadcast_filter_sender_and_subject": "test_filters",
    "test_add_remove_broadcast_subscriber": "test_broadcast_subscribers_come_and_go",
    "test_broadcast_noone_listening": "test_nobody_hears_a_broadcast",
}
"""``test/utils.py``"""
OF_THE_THREAD_COMMUNICATOR = {
    "test_context_manager": "test_what_was_asked_before_closing_is_still_answered",
    "test_custom_task_queue": "test_futures_in_futures",
    "test_task_queue_next": "test_next_task",
    "test_queue_get_next": "test_next_task",
    "test_queue_iter": "test_iterating",
    "test_queue_iter_not_process": "test_iterating",
    "test_queue_task_forget": "test_an_outcome_that_was_forgotten",
    "test_empty_queue": "test_an_empty_queue",
    "test_task_processing_exception": "test_an_error_in_the_block",
    "test_connection_close_callback": "test_close_callbacks",
    "test_jupyter_notebook": "test_in_a_notebook",
    "test_server_properties": "test_server_properties",
    "test_broadcast_send": "test_ones_own_broadcasts_are_heard_when_the_call_returns",
    "test_broadcast_filter_subject": "test_filters",
    "test_broadcast_filter_sender": "test_filters",
    "test_broadcast_filter_sender_and_subject": "test_filters",
}
"""``test/rmq/test_rmq_thread_communicator.py``. Its broadcasts have to be heard as soon as the call returns."""


def test_each_of_the_33_is_shown_here() -> None:
    """By a test that exists. One differs: `server_properties` names Prunus, theirs asks for RabbitMQ and Erlang."""
    ours = [*OF_EVERY_COMMUNICATOR.values(), *OF_THE_THREAD_COMMUNICATOR.values()]
    assert len(ours) == 33
    assert [name for name in ours if not callable(getattr(test_kiwipy, name, None))] == []
