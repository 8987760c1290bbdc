"""What a process is: its states, commands, ports, spec, steps and outline, and a driver for one event loop.

Read `states` for the two state machines, `machine` for the life of a step, `waits` for what can be waited for,
`control` for what can be asked from outside, `outline` for work chains.
"""

from prunus.processes.commands import Command, Continue, Kill, Stop, Wait
from prunus.processes.control import EditContext, Message, Pause, PauseAt, Play, Register, Resume, Settle, Update
from prunus.processes.control import Kill as KillMessage
from prunus.processes.execute import execute, run
from prunus.processes.fanout import MapResults
from prunus.processes.listeners import Line, ProcessListener
from prunus.processes.loading import class_id, load_class
from prunus.processes.machine import Effects, Reply, Transition
from prunus.processes.namespaces import AttributeDict, FrozenNamespace
from prunus.processes.outline import if_, return_, while_
from prunus.processes.pids import new_pid
from prunus.processes.ports import MISSING, InputPort, OutputPort, PortNamespace
from prunus.processes.process import Process
from prunus.processes.result import ProcessResult
from prunus.processes.spec import ExitCode, ProcessSpec
from prunus.processes.states import PlayState, ProcessState
from prunus.processes.steps import DidNotHappen, Happened, RetryPolicy, query, step, update
from prunus.processes.waits import Child, Mail, Outcomes, message, sleep, until
from prunus.processes.workchain import ToContext, WorkChain, WorkChainSpec, append_

__all__ = [
    "MISSING",
    "AttributeDict",
    "Child",
    "Command",
    "Continue",
    "DidNotHappen",
    "EditContext",
    "Effects",
    "ExitCode",
    "FrozenNamespace",
    "Happened",
    "InputPort",
    "Kill",
    "KillMessage",
    "Line",
    "Mail",
    "MapResults",
    "Message",
    "Outcomes",
    "OutputPort",
    "Pause",
    "PauseAt",
    "Play",
    "PlayState",
    "PortNamespace",
    "Process",
    "ProcessListener",
    "ProcessResult",
    "ProcessSpec",
    "ProcessState",
    "Register",
    "Reply",
    "Resume",
    "RetryPolicy",
    "Settle",
    "Stop",
    "ToContext",
    "Transition",
    "Update",
    "Wait",
    "WorkChain",
    "WorkChainSpec",
    "append_",
    "class_id",
    "execute",
    "if_",
    "load_class",
    "message",
    "new_pid",
    "query",
    "return_",
    "run",
    "sleep",
    "step",
    "until",
    "update",
    "while_",
]
