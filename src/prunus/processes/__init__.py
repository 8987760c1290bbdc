"""What a process is: its states, commands, ports, spec, steps and outline, and a driver for one event loop.

Read `states` for the two state machines, `process` for the life of a step, `outline` for work chains.
"""

from prunus.processes.commands import Child, Command, Continue, Kill, Stop, Wait
from prunus.processes.control import Kill as KillMessage
from prunus.processes.control import Message, Pause, Play, Resume, decode_message, encode_message
from prunus.processes.execute import execute, run
from prunus.processes.loading import class_id, load_class
from prunus.processes.namespaces import AttributeDict, FrozenNamespace
from prunus.processes.outline import if_, return_, while_
from prunus.processes.pids import new_pid
from prunus.processes.ports import MISSING, InputPort, OutputPort, PortNamespace
from prunus.processes.process import Process, Transition
from prunus.processes.result import ProcessResult
from prunus.processes.spec import ProcessSpec
from prunus.processes.states import PlayState, ProcessState
from prunus.processes.workchain import ToContext, WorkChain, WorkChainSpec, append_

__all__ = [
    "MISSING",
    "AttributeDict",
    "Child",
    "Command",
    "Continue",
    "FrozenNamespace",
    "InputPort",
    "Kill",
    "KillMessage",
    "Message",
    "OutputPort",
    "Pause",
    "Play",
    "PlayState",
    "PortNamespace",
    "Process",
    "ProcessResult",
    "ProcessSpec",
    "ProcessState",
    "Resume",
    "Stop",
    "ToContext",
    "Transition",
    "Wait",
    "WorkChain",
    "WorkChainSpec",
    "append_",
    "class_id",
    "decode_message",
    "encode_message",
    "execute",
    "if_",
    "load_class",
    "new_pid",
    "return_",
    "run",
    "while_",
]
