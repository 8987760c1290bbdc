"""What the user writes: a class with steps, and what they may call.

How a process goes from one state to the next stands in `prunus.processes.machine`, in `Process`'s other half.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    ParamSpec,
    Self,
    TypeVar,
    Unpack,
    assert_never,
    overload,
)

from msgspec.structs import replace as changed

from prunus.errors import (
    InvalidInputError,
    InvalidStateError,
    SpecError,
    UnsavableValueError,
)
from prunus.processes import commands, control, loading, stack, states
from prunus.processes.commands import Wait
from prunus.processes.control import CALM, Register
from prunus.processes.fanout import DEFAULT_IN_FLIGHT, FanOut, source_of
from prunus.processes.generics import InputsT, OutputsT
from prunus.processes.listeners import ProcessListener
from prunus.processes.machine import Machine
from prunus.processes.options import (
    DEFAULT_QUEUE,
    MapOptions,
    OnException,
    ParentClose,
    SubmitOptions,
    read_class_options,
    read_key,
    read_map_options,
    read_pid,
    read_priority,
    read_queue,
    read_resources,
    read_tags,
)
from prunus.processes.pids import new_pid
from prunus.processes.result import ProcessResult
from prunus.processes.spec import ExitCodes, NoStepsError, ProcessSpec, build
from prunus.processes.states import (
    Created,
    Excepted,
    Finished,
    Killed,
    Pending,
    Running,
    State,
    Waiting,
)
from prunus.processes.steps import StepOptions, read_steps
from prunus.processes.waits import (
    Child,
    OnMap,
    Waitable,
)

P = ParamSpec("P")
T = TypeVar("T")
ChildInputsT = TypeVar("ChildInputsT")
ChildOutputsT = TypeVar("ChildOutputsT")


class Process(Machine, Generic[InputsT, OutputsT]):
    """The base of all processes. A subclass defines its ports and a first step, ``run``.

    ``run`` and the other steps are methods, ``async def`` or plain ``def`` (those run in a worker thread). What a step
    returns says what comes next: a command (`Continue`, `Wait`, `Stop`, `Kill`), several waits in a list, an exit code,
    an instance of the class's `Outputs` (they are emitted, and the process finishes), None (it goes on waiting for what
    is left, or finishes), or any other value: the process finishes with it.
    """

    version: ClassVar[int] = 1
    """The version of the class, written into each checkpoint; see `migrate`."""
    run_sync_steps_in: ClassVar[Literal["thread", "loop"]] = "thread"
    """Where plain ``def`` steps run. On the loop they are cheap, and block everybody else while they last.

    An ``async def`` runs on the loop, in a task of its own; one without any ``await`` needs none, and has the current
    task of who drives the process."""
    on_exception: ClassVar[OnException] = "fail"
    """When a step raises for good: ``"fail"`` ends the process as EXCEPTED (its last good checkpoint stays),
    ``"pause"`` parks it paused and intact, before that step. Can be given at launch too."""
    listeners: ClassVar[tuple[ProcessListener, ...]] = ()
    """They listen to every process of the class, wherever it runs."""
    queue: ClassVar[str] = DEFAULT_QUEUE
    """Workers that take this queue run it. Like the two below it may be said for a class, and otherwise for one
    process when it is launched or submitted; see `prunus.processes.options`."""
    priority: ClassVar[int] = 0
    """0 to 9, 9 first. A child whose class says nothing has that of its parent."""
    resources: ClassVar[Mapping[str, int]] = {}
    """Tokens that it takes while a worker has it: ``{"licence": 1}``."""
    key: str | None = None
    """What its caller calls it; at most one process that is kept has this key."""
    spec_class: ClassVar[type[ProcessSpec]] = ProcessSpec
    if TYPE_CHECKING:  # any signature fits

        def run(self, *args: Any, **kwargs: Any) -> Any:
            """The first step."""

        def on_kill(self, message: str | None) -> Any:
            """The last step of a process that is killed, if the class has one: to end what it has begun elsewhere.

            Runs when a kill has ended the running step, or woken the process from its wait; `message` is that of the
            kill. It is a step like others: `@step` may give it a timeout (else it has the grace period of the kill) and
            a `RetryPolicy`, and if its worker dies it runs again. Whatever becomes of it, the process is KILLED then. A
            kill by force does without it, and so does one of a process that has not begun.
            """

    else:
        run = on_kill = None

    # --- the class ----------------------------------------------------------------------------------

    def __init_subclass__(cls, **options: Any) -> None:
        """A class that is defined wrongly is told so where it is defined (`SpecError`)."""
        super().__init_subclass__(**options)
        try:
            cls.spec()
        except NoStepsError:
            pass
        except SpecError as error:
            if not isinstance(error.__cause__, NameError):
                raise
        except NameError:  # it names what comes later in its module: then at its first use
            pass

    @classmethod
    def define(cls, spec: Any) -> None:
        """Fill the spec; an override begins with ``super().define(spec)``."""

    @classmethod
    def migrate(cls, checkpoint: dict[str, Any], from_version: int) -> dict[str, Any]:
        """Make a checkpoint of an older `version` of the class fit this one.

        `checkpoint` is what `snapshot` gave then: ``inputs``, ``outputs``, ``context``, ``state`` and more, as plain
        dictionaries. Change it, or return another one.
        """
        return checkpoint

    @classmethod
    def spec(cls) -> ProcessSpec:
        """The spec of this class; `SpecError` if it is defined wrongly."""
        try:
            return cls.__dict__["_spec"]  # type: ignore[no-any-return]
        except KeyError:
            if cls.run is None:
                told = f"{cls.__qualname__} has no step to begin with; define `async def run(self)`"
                raise NoStepsError(told) from None
            spec = build(cls)
            cls._refuse_reserved_names()
            try:
                read_class_options(cls)
            except ValueError as error:
                raise SpecError(f"{cls.__qualname__}: {error}") from error
            cls._table = read_steps(cls)
            cls._options = {}
            cls._spec = spec
            return spec

    @classmethod
    def steps(cls) -> Mapping[str, StepOptions]:
        """The steps that are marked with ``@step``, by their names."""
        cls.spec()
        return cls._table.marked

    @classmethod
    def queries(cls) -> Mapping[str, Callable[..., Any]]:
        """The methods that are marked with ``@query``, by their names."""
        cls.spec()
        return {name: getattr(cls, method) for name, method in cls._table.queries.items()}

    @classmethod
    def updates(cls) -> Mapping[str, Callable[..., Any]]:
        """The methods that are marked with ``@update``, by their names."""
        cls.spec()
        return {name: getattr(cls, method) for name, method in cls._table.updates.items()}

    @classmethod
    def _refuse_reserved_names(cls) -> None:
        for base in cls.__mro__:
            taken = [] if "_reserved" in vars(base) else sorted(cls._reserved & vars(base).keys())
            if taken:
                raise SpecError(
                    f"{base.__qualname__} defines {', '.join(taken)}, which Process needs for itself; a step or helper "
                    "must have another name"
                )

    @staticmethod
    def current() -> Process | None:
        """The process whose step this code runs in: also in its tasks and threads. None outside of any."""
        return stack.top()

    @staticmethod
    def current_step() -> str | None:
        """The name of the step that this code runs in; None outside of any."""
        return stack.current_step()

    _inputs: Any = None

    # --- a new one, and one from a checkpoint -------------------------------------------------------

    def __init__(
        self,
        inputs: InputsT | Mapping[str, Any] | None = None,
        *,
        pid: str | None = None,
        parent: str | None = None,
        tags: Iterable[str] = (),
        on_exception: OnException | None = None,
        parent_close: ParentClose = "kill",
        queue: str | None = None,
        priority: int | None = None,
        resources: Mapping[str, int] | None = None,
        key: str | None = None,
    ) -> None:
        """A new process, CREATED. `inputs` is a mapping or an instance of the class's `Inputs`.

        Raises `InvalidInputError` that names every wrong input, `ValueError` for a wrong option (see
        `prunus.processes.options`), and `SpecError` if the class is defined wrongly.
        """
        spec = self.spec()
        values, shown = spec.fill_inputs(inputs)
        if isinstance(tags, str):
            read_tags(tags)
        self._set_up(read_pid(pid) if pid else new_pid(), parent, tuple(tags), values, time.time())
        if shown is not None:
            self._inputs = shown
        if on_exception is not None:
            self._on_exception = _one_of("on_exception", on_exception, ("fail", "pause"))
        if parent_close != "kill":
            self.parent_close = _one_of("parent_close", parent_close, ("kill", "abandon", "wait"))
        if queue is not None:
            vars(self)["queue"] = read_queue(queue)
        if priority is not None:
            vars(self)["priority"] = read_priority(priority)
        if resources is not None:
            vars(self)["resources"] = read_resources(resources)
        if key is not None:
            if parent is not None:
                raise ValueError("a child has no key: its parent waits for the very pid that it gave")
            self.key = read_key(key)

    def _set_up(
        self, pid: str, parent: str | None, tags: tuple[str, ...], values: dict[str, Any], created_at: float
    ) -> None:
        self._begin_idle()
        self.pid = pid
        self.parent = parent
        self.tags = tags
        self.created_at = created_at
        """Wall clock, seconds since 1970; for showing only."""
        self._values = values
        self._outputs: dict[str, Any] = {}
        self._state: State = _CREATED

    def snapshot(self) -> dict[str, Any]:
        """The process as plain dictionaries and lists, with the user's own values in them.

        A snapshot that is taken while a step runs is the one from before that step.
        """
        facts = {
            "class_id": self.class_id,
            "version": self.version,
            "pid": self.pid,
            "parent": self.parent,
            "tags": list(self.tags),
            "created_at": self.created_at,
            "inputs": self._values,
            "outputs": self._outputs,
            "state": states.to_data(self._state),
            "step_number": self._step_number,
            "has_last_step": self.on_kill is not None,
        }
        if self._status is not None:
            facts["status"] = self._status
        if self._register is not CALM:
            facts["control"] = control.register_to_data(self._register)
        if self._on_exception is not None:
            facts["on_exception"] = self._on_exception
        if self.parent_close != "kill":
            facts["parent_close"] = self.parent_close
        own = vars(self)
        for name in _OWN_OPTIONS:
            if name in own:
                facts[name] = own[name]
        if self._done:
            facts["done"] = dict(self._done)
        if self._awaits_at_end:
            facts["awaits_at_end"] = list(self._awaits_at_end)
        return facts

    @classmethod
    def restore(cls, snapshot: Mapping[str, Any]) -> Self:
        """The process that `snapshot` describes; it goes on where that one was.

        Raises `SpecError` if the class does not fit any more: a step or an input that it had is gone, or it is older
        than the checkpoint. A snapshot of an older version of the class goes through `migrate` first.
        """
        process = cls.__new__(cls)
        version = snapshot.get("version", 1)
        if version > cls.version:
            raise SpecError(
                f"{cls.__qualname__} is of version {cls.version}, and this checkpoint of version {version}: a newer "
                "class wrote it"
            )
        if version < cls.version:
            try:
                snapshot = cls.migrate(dict(snapshot), version)
            except Exception as error:  # user code
                raise SpecError(f"{cls.__qualname__}.migrate failed from version {version}: {error!r}") from error
            if not isinstance(snapshot, Mapping):
                raise SpecError(
                    f"{cls.__qualname__}.migrate must return the checkpoint, a dictionary, from version {version}; it "
                    f"returned {snapshot!r}"
                )
        try:
            process._load(snapshot)
        except (KeyError, ValueError, TypeError) as error:
            raise SpecError(f"this is no checkpoint of a {cls.__qualname__}: {error!r}") from error
        return process

    def _load(self, snapshot: Mapping[str, Any]) -> None:
        spec = self.spec()
        self._set_up(
            snapshot["pid"],
            snapshot["parent"],
            tuple(snapshot["tags"]),
            dict(snapshot["inputs"]),
            snapshot["created_at"],
        )
        self._outputs = dict(snapshot["outputs"])
        self._state = self._with_current_names(states.from_data(snapshot["state"]))
        self._step_number = snapshot["step_number"]
        if (status := snapshot.get("status")) is not None:
            self._status = status
        if (wanted := snapshot.get("control")) is not None:
            self._register = control.register_from_data(wanted)
        elif snapshot.get("play", "playing") != "playing":  # as Prunus 0.1 wrote it
            self._register = Register(pause=True)
        if (on_exception := snapshot.get("on_exception")) is not None:
            self._on_exception = on_exception
        if (parent_close := snapshot.get("parent_close")) is not None:
            self.parent_close = parent_close
        vars(self).update({name: snapshot[name] for name in _OWN_OPTIONS if name in snapshot})
        if (done := snapshot.get("done")) is not None:
            self._done = dict(done)
        if (awaited := snapshot.get("awaits_at_end")) is not None:
            self._awaits_at_end = tuple(awaited)
        self._play = self._wanted_play()
        if spec.input_class is not None:
            try:
                self._inputs = spec.show_inputs(self._values)
            except Exception as error:  # user code: the class's Inputs, as it is now
                raise SpecError(f"{spec.name}.Inputs does not take the inputs of this checkpoint: {error}") from error

    def _with_current_names(self, state: State) -> State:
        """The state with each step under the name that it has now; raises `SpecError` for one that is gone."""

        def current(name: str) -> str:
            name = self._table.current_name(name)
            self._find_step(name)
            return name

        def still(pending: tuple[Pending, ...]) -> tuple[Pending, ...]:
            return tuple(item if item.step is None else changed(item, step=current(item.step)) for item in pending)

        match state:
            case Created():
                return changed(state, step=current(state.step))
            case Running():
                return changed(state, step=current(state.step), pending=still(state.pending))
            case Waiting():
                return Waiting(still(state.pending))
            case Finished() | Excepted() | Killed():
                return state
            case _:
                assert_never(state)

    # --- what can be asked --------------------------------------------------------------------------

    @property
    def class_id(self) -> str:
        """``module:QualName``."""
        return loading.class_id(type(self))

    @property
    def inputs(self) -> InputsT:
        """The inputs, by attribute: an instance of the class's `Inputs` if it has one; never changed."""
        if self._inputs is None:
            self._inputs = self._spec.show_inputs(self._values)
        return self._inputs  # type: ignore[no-any-return]

    @property
    def outputs(self) -> Mapping[str, Any]:
        """The outputs so far; inside a step with those that it has emitted."""
        attempt = self._mine()
        return self._spec.outputs.freeze_values(
            self._outputs if attempt is None else attempt.outputs, f"the outputs of {self._spec.name}"
        )

    @property
    def exit_codes(self) -> ExitCodes:
        """The exit codes of the class, by their labels: ``return self.exit_codes.ERROR_NO_ENERGY``."""
        return self._spec.exit_codes

    def result(self) -> ProcessResult[OutputsT]:
        """How it ended; `InvalidStateError` if it has not."""
        state = self._state
        outputs: Any = self._outputs
        match state:
            case Finished(value, status, message):
                return ProcessResult(self.pid, state.kind, outputs, status, message, value=value)
            case Excepted(failure):
                return ProcessResult(self.pid, state.kind, outputs, failure=failure)
            case Killed(message):
                return ProcessResult(self.pid, state.kind, outputs, exit_message=message)
            case Created() | Running() | Waiting():
                raise InvalidStateError(state.kind.value, "terminated")
            case _:
                assert_never(state)

    def query(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Ask one of its queries. Raises `InvalidInputError` for what it does not take, and what the query raises."""
        arguments = self.read_arguments(name, args, kwargs)
        if name not in self._table.queries:
            raise InvalidInputError(type(self).__qualname__, {name: "it is an update, which changes the process"})
        return getattr(self, self._table.queries[name])(**arguments)

    async def execute(self) -> ProcessResult[OutputsT]:
        """Run it here to its end, its children too; see `prunus.execute`."""
        from prunus.processes.execute import execute

        return await execute(self)

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} {self.pid} {self.state.value} {self._play.value}>"

    # --- for steps ----------------------------------------------------------------------------------

    def out(self, name: str, value: Any) -> None:
        """Emit an output; a dotted name is one in a namespace. Raises `InvalidInputError` if it does not fit."""
        value = self._spec.read_output(name, value)
        attempt = self._mine()
        outputs = self._outputs if attempt is None else attempt.outputs
        *on_the_way, last = name.split(".")
        for segment in on_the_way:
            inner = outputs[segment] = dict(outputs.get(segment, {}))
            outputs = inner
        outputs[last] = value
        if self._listening:
            self._tell_listeners("on_output", name, value)

    def out_many(self, values: Mapping[str, Any]) -> None:
        """Emit several outputs."""
        for name, value in values.items():
            self.out(name, value)

    def set_status(self, text: str | None) -> None:
        """Say in a line what goes on, for people. It survives pauses and restarts."""
        if not self._is_stale():
            self._status = text

    def report(self, text: str) -> None:
        """Write a line into the log of the process (``prunus logs PID``), from any step, task or thread of it."""
        self.write_line("REPORT", text)

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger whose lines go into the log of the process too."""
        return _ProcessLogger(self)

    def heartbeat(self, progress: float | None = None, detail: str | None = None) -> None:
        """Say that this step is alive, and how far it is (from 0 to 1). From any thread; cheap enough for a loop."""
        attempt = self._mine()
        if attempt is None or self._is_stale():
            return
        attempt.beat()
        if (progress, detail) == (None, None) or (progress, detail) == (attempt.progress, attempt.detail):
            return
        attempt.progress, attempt.detail = progress, detail
        if self._listening:
            self._tell_listeners("on_progress", progress, detail)
        if self.driver is not None:
            attempt.ask_loop(self.driver.said)

    def submit(
        self,
        process_class: type[Process[ChildInputsT, Any]],
        inputs: ChildInputsT | Mapping[str, Any] | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Child:
        """Make a child process. It starts when this step has ended, and goes on by itself.

        The `options` are ``pid``, ``tags``, ``queue``, ``priority``, ``resources``, ``on_exception`` and
        ``parent_close`` (`prunus.processes.options`). ``parent_close`` says what becomes of it when this process ends:
        ``"kill"``: it is killed when this one is killed; ``"abandon"``: nothing; ``"wait"``: this one does not finish
        before it has ended. Its inputs are checked here and now (`InvalidInputError`). The handle can be waited for.
        """
        if not (isinstance(process_class, type) and issubclass(process_class, Process)):
            raise TypeError(f"a child is made of a Process class and its inputs, not of {process_class!r}")
        child = self._make_child(process_class, inputs, options.pop("pid", None), options)
        attempt = self._mine()
        if attempt is None:
            raise InvalidStateError(self.state.value, "in a step to submit a child")
        attempt.children.append(child)
        return Child(child.pid, child.class_id)

    def _make_child(
        self, process_class: type[Process], inputs: Any, pid: str | None, options: Mapping[str, Any]
    ) -> Process:
        if self.priority and options.get("priority") is None and not process_class._says_priority():
            options = {**options, "priority": self.priority}
        return process_class(inputs, pid=pid, parent=self.pid, **options)

    @classmethod
    def _says_priority(cls) -> bool:
        return any("priority" in vars(base) for base in cls.__mro__ if base is not Process)

    def map(
        self,
        process_class: type[Process[ChildInputsT, Any]],
        items: range
        | Sequence[ChildInputsT | Mapping[str, Any]]
        | Callable[[int], ChildInputsT]
        | Callable[[int], Mapping[str, Any]],
        *,
        count: int | None = None,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        on_error: Literal["collect", "fail"] = "collect",
        then: commands.StepRef | None = None,
        name: str | None = None,
        msg: str | None = None,
        **options: Unpack[MapOptions],
    ) -> Wait:
        """A wait for one child of `process_class` for each of `items`, at most `max_in_flight` at a time.

        `items` are the inputs of the children: a list, a ``range`` of an integer input of the only port, or a method of
        this class that is given a number from 0 to `count` - 1 and returns the inputs of that child; so a million of
        them need no memory. `then` gets the `MapResults`, in the order of the items (as the keyword argument `name`, if
        that is given; in a work chain ``ctx.<name>`` has it). A child that does not finish with
        exit status 0 is a result like the others, or, with ``on_error="fail"``, the end of this process. The other
        `options` are those of `submit`, for each child.
        """
        _one_of("on_error", on_error, ("collect", "fail"))
        if max_in_flight < 1:
            raise ValueError(f"map(max_in_flight={max_in_flight}): at least one child must run at a time")
        said = read_map_options(options)
        source, number = source_of(self, items, count)
        if source[0] == "range" and not process_class.spec().inputs.ports:
            raise TypeError(f"map over a range: {process_class.__qualname__} has no input to give its numbers to")
        attempt = self._mine()
        if attempt is None:
            raise InvalidStateError(self.state.value, "in a step to map over items")
        prefix = f"{self.pid}.{self._step_number}" + (f"-{attempt.maps}" if attempt.maps else "")
        attempt.maps += 1
        self._mapped = {**self._mapped, loading.class_id(process_class): process_class}
        fan = FanOut(loading.class_id(process_class), prefix, source, number, max_in_flight, on_error, options=said)
        return Wait(then=then, on=OnMap(fan, name), msg=msg or f"maps {process_class.__name__} over {number} items")

    def as_completed(self, children: Iterable[Waitable], step: commands.StepRef) -> list[Wait]:
        """Waits for each of `children`: `step` is run with the result of each, one after the other, as they end."""
        return [Wait(child, then=step) for child in children]

    def call(
        self,
        process_class: type[Process[ChildInputsT, ChildOutputsT]],
        inputs: ChildInputsT | Mapping[str, Any] | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> Call[ChildOutputsT]:
        """Run a process here, within this step, and wait for it: ``result = await self.call(Child, inputs)``.

        In a plain ``def`` step write ``self.call(Child, inputs).result()``. It is for short work: nothing of it is
        stored, and it runs again if this step does. It is killed if this step is. Raises as `execute` does.
        """
        if self._mine() is None:
            raise InvalidStateError(self.state.value, "in a step to call a process")
        return Call(self, process_class(inputs, parent=self.pid, tags=tags))

    @overload
    async def do(
        self, name: str, function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @overload
    async def do(self, name: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def do(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function once: its value is kept under `name`, durably, until this step ends.

        When the step runs again (after a crash, or because it failed and is tried again) the value is taken from
        there. A plain function runs in a worker thread. The same name in the same step is the same value.
        """
        attempt = self._mine()
        if attempt is None:
            raise InvalidStateError(self.state.value, "in a step to do something once")
        attempt.doing = defaultdict(asyncio.Lock) if attempt.doing is None else attempt.doing
        async with attempt.doing[name]:
            if name in self._done:
                return self._done[name]
            value = await attempt.call(function, *args, **kwargs)
            if self._is_stale():
                raise asyncio.CancelledError
            self._done = {**self._done, name: value}
            try:
                if self.driver is not None:
                    await self.driver.keep()
            except UnsavableValueError:
                self._done = {each: kept for each, kept in self._done.items() if each != name}
                raise
        return value

    def exposed_inputs(self, process_class: type[Process], namespace: str | None = None) -> dict[str, Any]:
        """Those of the inputs that `expose_inputs` took over from `process_class`: ready for `submit`."""
        return self._spec.pick_exposed_inputs(process_class, self._values, namespace)

    def exposed_outputs(
        self, child: ProcessResult, process_class: type[Process], namespace: str | None = None
    ) -> dict[str, Any]:
        """Those of a child's outputs that `expose_outputs` took over from its class: ready for `out_many`."""
        return self._spec.pick_exposed_outputs(process_class, child.outputs, namespace)

    # --- for drivers --------------------------------------------------------------------------------

    def send(self, name: str, value: Any = None) -> None:
        """Send it a message, if it runs here (see `prunus.execute`); it may come before anybody waits for it.

        Raises `InvalidInputError` for one that the class does not declare or a value that does not fit.
        """
        value = self._spec.read_message(name, value)
        if self.driver is None:
            raise InvalidStateError(self.state.value, "running here to get a message; use `ProcessHandle.send`")
        self.driver.deliver(name, value)

    def fork(self, pid: str | None, changed_context: Mapping[str, Any]) -> Self:
        """A new process that goes on from here, with a changed context; nothing is wanted of it yet."""
        snapshot = {**self.snapshot(), "pid": pid or new_pid(), "created_at": time.time(), "parent": None}
        for name in ("control", "done", "status", "awaits_at_end", "key"):  # (a key is one process's)
            snapshot.pop(name, None)
        forked = self.restore(snapshot)
        if isinstance(forked._state, Running):  # a step of its own, which has not begun yet
            forked._state = changed(forked._state, effect="")
        if changed_context:
            forked._edit_context(changed_context)
        return forked


class Call(Generic[ChildOutputsT]):
    """A process that is called within a step: ``await`` it, or, in a plain ``def`` step, ask for its `result`."""

    def __init__(self, caller: Process, process: Process[Any, ChildOutputsT]) -> None:
        self._caller = caller
        self._process = process

    def __await__(self) -> Generator[Any, None, ProcessResult[ChildOutputsT]]:
        return self._run().__await__()

    def result(self) -> ProcessResult[ChildOutputsT]:
        """Wait for its end, in a thread. Raises as `prunus.execute` does."""
        return self._caller._from_thread(self._run())

    async def _run(self) -> ProcessResult[ChildOutputsT]:
        from prunus.processes.execute import execute

        return await execute(self._process, caller=self._caller)


class _ProcessLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger of the process's module, whose lines go into the log of the process too."""

    def __init__(self, process: Process) -> None:
        super().__init__(logging.getLogger(type(process).__module__), {"pid": process.pid})
        self._process = process

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        super().log(level, msg, *args, **kwargs)
        if level >= logging.INFO:
            try:
                text = logging.LogRecord("", level, "", 0, msg, args, None).getMessage()
            except Exception:  # a wrong format of the user's: as with `logging`, it breaks nothing
                text = f"{msg} {args}"
            self._process.write_line(logging.getLevelName(level), text)


_CREATED = Created("run")
_OWN_OPTIONS = ("queue", "priority", "resources", "key")
"""What a process may have of its own instead of its class's."""

OVERRIDABLE = frozenset(
    {"define", "listeners", "migrate", "on_exception", "on_kill", "on_paused", "on_playing", "on_terminated", "restore"}
    | {"run", "run_sync_steps_in", "snapshot", "spec_class", "version", "_spec", "_table", "_options"}
    | {"queue", "priority", "resources"}
)
"""What a subclass may define anew."""


def names_of(base: type[Machine]) -> frozenset[str]:
    """What `base` defines for itself, and no subclass may."""
    names = (*vars(base), *inspect.get_annotations(base))
    return frozenset(name for name in names if not name.startswith("__")) - OVERRIDABLE


Process._reserved = Machine._reserved = names_of(Machine) | names_of(Process)


def _one_of(what: str, value: T, choices: Sequence[T]) -> T:
    if value not in choices:
        raise ValueError(f"{what} is one of {', '.join(map(repr, choices))}, not {value!r}")
    return value
