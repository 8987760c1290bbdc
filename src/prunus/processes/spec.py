"""The spec of a process class: its inputs, outputs, messages and exit codes, and for a work chain its outline.

There is one spec for a class, filled in two ways that may be mixed: by ``define(cls, spec)`` and by nested classes
``Inputs``, ``Outputs`` and ``Messages`` (dataclasses, msgspec Structs or pydantic models). It is built once, when it is
first asked for, and never changes after that, at no level.

What a class takes over from another one (`ProcessSpec.expose_inputs`) is remembered, so that exactly that can be handed
on to a child (`pick_exposed`).
"""

from __future__ import annotations

import contextvars
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from prunus.errors import InvalidInputError, SpecError
from prunus.processes.generics import types_said
from prunus.processes.namespaces import FrozenNamespace, thaw
from prunus.processes.ports import (
    MISSING,
    InputPort,
    Missing,
    OutputPort,
    Port,
    PortNamespace,
    Serializer,
    Validator,
)
from prunus.processes.schemas import (
    Field,
    Problems,
    Schema,
    brief,
    build_model,
    fields_of,
    model_fields,
    model_kind,
    unknown,
)

if TYPE_CHECKING:
    from prunus.processes.process import Process


# --- exit codes -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExitCode:
    """How a process may end: a number (0 is a success), a name, and a sentence for people."""

    status: int
    label: str
    message: str

    def format(self, **values: Any) -> ExitCode:
        """The exit code with the ``{names}`` in its message filled in. `ValueError` if one of them is not given."""
        try:
            return ExitCode(self.status, self.label, self.message.format_map(values))
        except KeyError as error:
            raise ValueError(
                f"the message of {self.label} needs a value for {error.args[0]!r}: {self.message!r}"
            ) from None

    def __str__(self) -> str:
        return f"{self.label} ({self.status}): {self.message}"


ERROR_INVALID_OUTPUT: Final = ExitCode(
    10, "ERROR_INVALID_OUTPUT", "the process emitted outputs that do not fit: {problems}"
)
ERROR_MISSING_OUTPUT: Final = ExitCode(
    11, "ERROR_MISSING_OUTPUT", "the process did not emit the required output {missing}"
)


class ExitCodes:
    """The exit codes of a class, by label (an attribute) and by status (an item)."""

    __slots__ = ("_by_label", "_by_status", "_name")

    def __init__(self, name: str, codes: Iterable[ExitCode]) -> None:
        self._name = name
        self._by_label = {code.label: code for code in sorted(codes, key=lambda code: code.status)}
        self._by_status = {code.status: code for code in self._by_label.values()}

    def __getattr__(self, label: str) -> ExitCode:
        if label.startswith("_"):  # also while a copy of it is being built
            raise AttributeError(label)
        try:
            return self._by_label[label]
        except KeyError:
            raise AttributeError(
                f"{self._name} has no exit code {label}; there are: {', '.join(self._by_label)}"
            ) from None

    def __getitem__(self, status: int) -> ExitCode:
        try:
            return self._by_status[status]
        except KeyError:
            known = ", ".join(map(str, self._by_status))
            raise KeyError(f"{self._name} has no exit code with status {status!r}; there are: {known}") from None

    def __iter__(self) -> Iterator[ExitCode]:
        return iter(self._by_label.values())

    def __len__(self) -> int:
        return len(self._by_label)

    def __contains__(self, code: object) -> bool:
        return code in self._by_label.values() or code in self._by_label or code in self._by_status

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self._by_label]

    def __repr__(self) -> str:
        return f"<exit codes of {self._name}: {', '.join(f'{code.label} ({code.status})' for code in self)}>"


# --- messages -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MessagePort:
    """A message that may be sent to a process, by its name."""

    name: str
    schema: Schema
    help: str | None = None

    def describe(self) -> dict[str, Any]:
        about: dict[str, Any] = {"type": self.schema.text}
        if self.help:
            about["help"] = self.help
        return about


# --- exposed ports --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exposure:
    """What was taken over from a class into one namespace."""

    paths: tuple[str, ...]
    """Dotted, inside the namespace; that of a namespace stands for all in it."""
    others: bool = False
    """Values without a port are taken over too: the other class takes any names."""


class NoStepsError(SpecError):
    """The class has no steps: it is only a base for others."""


class ProcessSpec:
    """What a process class takes and gives."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs = PortNamespace("inputs")
        self.outputs = PortNamespace("outputs")
        self.input_class: type[Any] | None = None
        """The class's `Inputs`, if that class alone makes up the inputs."""
        self.output_class: type[Any] | None = None
        """The class's `Outputs`."""
        self.messages: Mapping[str, MessagePort] = {}
        self.exit_codes = ExitCodes(name, (ERROR_INVALID_OUTPUT, ERROR_MISSING_OUTPUT))
        self.exposures: Mapping[tuple[str, str | None, type[Process]], Exposure] = {}
        """By "inputs" or "outputs", namespace and class."""
        self._input_model: _Model | None = None
        self._output_model: _Model | None = None
        self._needs_no_outputs = False
        """A process that emits nothing has all outputs, and no defaults are to be filled in."""
        self._is_complete = False

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("_is_complete"):
            raise SpecError(f"the spec of {self.name} is complete and can't be changed any more; set it in `define`")
        object.__setattr__(self, name, value)

    # --- defining it --------------------------------------------------------------------------------

    def input(
        self,
        name: str,
        *,
        valid_type: Any = Any,
        required: bool | None = None,
        default: Any = MISSING,
        validator: Validator | None = None,
        serializer: Serializer | None = None,
        help: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Define an input; a dotted `name` puts it into a namespace. An input of the same name is replaced.

        `valid_type`: a class, a tuple of classes or an annotation; of ``list[float]`` the contents are checked too.
        `default`: a value (each process has its own copy), a function without arguments that makes one, or a function
        of the inputs beside this one (``lambda inputs: 2 * inputs.cutoff``). Without one the input is required, unless
        `required` is false. `validator`: a function of the value, or of the value and the port, that returns what is
        wrong, or None. `serializer`: makes a value of the valid type out of another one that was given
        (``Schema(Cell).read`` reads a dataclass from a dictionary). `metadata`: anything else that is to be known of
        the port. Raises `SpecError`.
        """
        schema = Schema(valid_type, name, reads=False)
        port = InputPort(
            name,
            schema,
            required=required,
            default=default,
            validator=validator,
            serializer=serializer,
            help=help,
            metadata=metadata,
        )
        self.inputs.add(name, port)

    def output(
        self,
        name: str,
        *,
        valid_type: Any = Any,
        required: bool | None = None,
        default: Any = MISSING,
        validator: Validator | None = None,
        help: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Define an output; a process that ends without a required one has `ERROR_MISSING_OUTPUT`. See `input`."""
        schema = Schema(valid_type, name, reads=False)
        port = OutputPort(
            name, schema, required=required, default=default, validator=validator, help=help, metadata=metadata
        )
        self.outputs.add(name, port)

    def input_namespace(
        self,
        name: str,
        *,
        required: bool | Missing = MISSING,
        dynamic: bool | Missing = MISSING,
        valid_type: Any = MISSING,
        validator: Validator | Missing | None = MISSING,
        help: str | Missing | None = MISSING,
        metadata: Mapping[str, Any] | Missing | None = MISSING,
    ) -> None:
        """Define a namespace of inputs, or change what is said of one; its ports stay.

        A `dynamic` one takes any names, with values of `valid_type`, in namespaces too. One that is not `required` and
        not given is left out, with the defaults in it. `validator` sees all values of the namespace, when each of them
        is right. Raises `SpecError`.
        """
        _define_namespace(self.inputs, name, required, dynamic, valid_type, validator, help, metadata)

    def output_namespace(
        self,
        name: str,
        *,
        required: bool | Missing = MISSING,
        dynamic: bool | Missing = MISSING,
        valid_type: Any = MISSING,
        validator: Validator | Missing | None = MISSING,
        help: str | Missing | None = MISSING,
        metadata: Mapping[str, Any] | Missing | None = MISSING,
    ) -> None:
        """Define a namespace of outputs; see `input_namespace`."""
        _define_namespace(self.outputs, name, required, dynamic, valid_type, validator, help, metadata)

    def expose_inputs(
        self,
        process_class: type[Process],
        namespace: str | None = None,
        *,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        namespace_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Take over the inputs of another class, into `namespace` if given.

        `include` or `exclude` are dotted paths of whole segments: ``a`` is the port or namespace ``a``, and never
        ``ab``. `namespace_options` are those of `input_namespace`, for `namespace`. Validators of whole namespaces are
        taken over if all ports in them are, and they see these only. Raises `SpecError`, also for paths that the other
        class does not have.
        """
        self._expose("inputs", process_class, namespace, include, exclude, namespace_options)

    def expose_outputs(
        self,
        process_class: type[Process],
        namespace: str | None = None,
        *,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        namespace_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Take over the outputs of another class; see `expose_inputs`."""
        self._expose("outputs", process_class, namespace, include, exclude, namespace_options)

    def exit_code(self, status: int, label: str, message: str) -> None:
        """Define a way to end: ``return self.exit_codes.<label>``, perhaps with ``.format(...)`` for ``{names}`` in it.

        The same status and label may be defined again, in a subclass, with another message. Raises `SpecError` if the
        status or the label alone is in use already.
        """
        if isinstance(status, bool) or not isinstance(status, int) or status < 0:
            raise SpecError(f"the status of an exit code is a number, 0 or more; {label} has {status!r}")
        if not isinstance(label, str) or not label.isidentifier() or label.startswith("_"):
            raise SpecError(f"the label of an exit code is an identifier, like ERROR_NO_ENERGY; {status} has {label!r}")
        _refuse_unnamed_fields(label, message)
        codes = {code.label: code for code in self.exit_codes}
        for code in codes.values():
            if (code.status == status) != (code.label == label):
                raise SpecError(f"the exit code {label} ({status}) conflicts with {code.label} ({code.status})")
            if code.status == status and code in (ERROR_INVALID_OUTPUT, ERROR_MISSING_OUTPUT):
                raise SpecError(f"the exit code {code.label} ({code.status}) is set by Prunus itself; take another one")
        self.exit_codes = ExitCodes(self.name, {**codes, label: ExitCode(status, label, message)}.values())

    def message(self, name: str, *, valid_type: Any = Any, help: str | None = None) -> None:
        """Define a message that may be sent to a process of this class. Its value is read by `Schema.read`."""
        if not name.isidentifier() or name.startswith("_"):
            raise SpecError(f"{name!r} can't be the name of a message; take an identifier")
        self.messages = {**self.messages, name: MessagePort(name, Schema(valid_type, f"the message {name}"), help)}

    def outline(self, *instructions: Any) -> None:
        """Only a `WorkChain` has an outline."""
        raise SpecError(f"{self.name} is no WorkChain, so it has no outline")

    def complete(self, process_class: type[Process]) -> None:
        """Compile what is defined; changes are refused from now on."""
        if self._input_model is not None:
            self._input_model = self._input_model.within(self.inputs)
            self.input_class = self._input_model.kind if self._input_model.names is None else None
        if self._output_model is not None:
            self.output_class = self._output_model.kind
            self._output_model = self._output_model.within(self.outputs)
        self.inputs.freeze()
        self.outputs.freeze()
        self._needs_no_outputs = self._output_model is None and self.outputs.is_content_with_nothing
        self.messages = MappingProxyType(dict(self.messages))
        self.exposures = MappingProxyType(dict(self.exposures))
        self._is_complete = True

    def _expose(
        self,
        kind: str,
        process_class: type[Process],
        namespace: str | None,
        include: Iterable[str] | None,
        exclude: Iterable[str] | None,
        options: Mapping[str, Any] | None,
    ) -> None:
        where = f"exposing the {kind} of {process_class.__qualname__}"
        wanted, unwanted = _paths("include", include, where), _paths("exclude", exclude, where)
        if wanted is not None and unwanted:
            raise SpecError(f"{where}: give include or exclude, not both")
        if wanted == ():
            raise SpecError(f"{where}: an empty include exposes nothing; leave it away for all")
        other = process_class.spec()
        source, model = (other.inputs, other._input_model) if kind == "inputs" else (other.outputs, other._output_model)
        space = self.inputs if kind == "inputs" else self.outputs
        if namespace is not None:
            space, is_new = space.space(namespace)
            if is_new:
                space.configure(namespace, {"help": source.help or MISSING, "metadata": source.metadata or MISSING})
        paths, is_whole = space.merge(source, wanted, unwanted or ())
        if is_whole and model is not None:
            space.add_check(model.build, (field.name for field in model.fields))
        others = wanted is None and source.dynamic
        if others:
            space.configure(namespace or kind, {"dynamic": True, "valid_type": source.schema.annotation})
        if options is not None:
            if "validator" in options:
                space.drop_checks()
            space.configure(namespace or kind, options)
        self.exposures = {**self.exposures, (kind, namespace, process_class): Exposure(paths, others)}

    # --- using it: inputs ---------------------------------------------------------------------------

    def fill_inputs(self, inputs: Any) -> tuple[dict[str, Any], Any]:
        """The inputs as a plain dictionary, complete and checked, and what `process.inputs` is.

        The second is None if `Inputs` does not make up the inputs: `show_inputs` makes it when it is needed. `inputs`
        is a mapping, None, or an instance of a class with fields. Raises `InvalidInputError` with every problem.
        """
        if inputs is None:
            inputs = {}
        elif not isinstance(inputs, dict) and model_kind(type(inputs)) is not None:
            inputs = fields_of(inputs)
        problems = Problems()
        filled, instance = _fill(self.inputs, self._input_model, inputs, "inputs", problems)
        if problems:
            raise InvalidInputError(self.name, problems)
        return filled, instance if self.input_class is not None else None

    def read_inputs(self, inputs: Any) -> dict[str, Any]:
        """The first of `fill_inputs`."""
        return self.fill_inputs(inputs)[0]

    def show_inputs(self, values: Mapping[str, Any]) -> Any:
        """What `process.inputs` is: an instance of the class's `Inputs`, or a frozen namespace.

        Raises `InvalidInputError` if `Inputs` does not take the values (those of an old checkpoint, say).
        """
        if self.input_class is None:
            return self.inputs.freeze_values(values, f"the inputs of {self.name}")
        assert self._input_model is not None
        problems = Problems()
        instance = self._input_model.build(values, "inputs", problems)
        if problems:
            raise InvalidInputError(self.name, problems)
        return instance

    def exposed_inputs(self, process_class: type[Process], namespace: str | None = None) -> tuple[str, ...]:
        """The dotted paths of what `expose_inputs` took over, inside `namespace`; that of a namespace means all in it.

        Raises `SpecError` if nothing was taken over from this class into this namespace.
        """
        return _exposure(self, "inputs", process_class, namespace).paths

    def exposed_outputs(self, process_class: type[Process], namespace: str | None = None) -> tuple[str, ...]:
        """The dotted paths of what `expose_outputs` took over; see `exposed_inputs`."""
        return _exposure(self, "outputs", process_class, namespace).paths

    def pick_exposed_inputs(
        self, process_class: type[Process], values: Mapping[str, Any], namespace: str | None = None
    ) -> dict[str, Any]:
        """Of the inputs `values` of this class, those for a child: what `expose_inputs` took over from its class."""
        exposure = _exposure(self, "inputs", process_class, namespace)
        inner: Any = values
        for segment in namespace.split(".") if namespace else ():
            inner = inner.get(segment) or {}
        return pick_exposed(inner, exposure, self._named_at("inputs", namespace))

    def pick_exposed_outputs(
        self, process_class: type[Process], outputs: Mapping[str, Any], namespace: str | None = None
    ) -> dict[str, Any]:
        """Of the `outputs` of a child, those that `expose_outputs` took over, by their dotted names here."""
        exposure = _exposure(self, "outputs", process_class, namespace)
        picked = pick_exposed(outputs, exposure, process_class.spec().outputs.ports)
        source = process_class.spec().outputs
        prefix = f"{namespace}." if namespace else ""
        return {f"{prefix}{path}": value for path, value in _leaves(picked, source)}

    def _named_at(self, kind: str, namespace: str | None) -> Mapping[str, Any]:
        space: PortNamespace = getattr(self, kind)
        found = space.find(namespace) if namespace else space
        return found.ports if isinstance(found, PortNamespace) else {}

    # --- using it: outputs, messages ----------------------------------------------------------------

    def read_output(self, name: str, value: Any) -> Any:
        """Check one output by its dotted name; the value to keep. Raises `InvalidInputError`."""
        problems = Problems()
        value = self.outputs.accept(name.split("."), value, "outputs", problems)
        if problems:
            raise InvalidInputError(self.name, problems)
        return value

    def check_outputs(self, outputs: Mapping[str, Any]) -> tuple[dict[str, Any], ExitCode | None]:
        """The outputs, complete with defaults, and the exit code if some are missing or wrong; never raises."""
        if not outputs and self._needs_no_outputs:
            return {}, None
        problems = Problems()
        filled, _ = _fill(self.outputs, self._output_model, outputs, "outputs", problems)
        if not problems:
            return filled, None
        if len(problems) == len(problems.missing):
            names = [path.removeprefix("outputs.") for path in problems.missing]
            return filled, ERROR_MISSING_OUTPUT.format(missing=", ".join(names))
        told = "; ".join(f"{path}: {problem}" for path, problem in problems.items())
        return {**outputs, **filled}, ERROR_INVALID_OUTPUT.format(problems=told)

    def check_message(self, name: str, schema: Any = MISSING) -> None:
        """Raises `InvalidInputError` if no message `name` is declared, `SpecError` if its type is not `schema`."""
        if name not in self.messages:
            problem = unknown("message", name, self.messages)
            if schema is not MISSING:
                problem += f"; declare it: spec.message({name!r}, valid_type={_code_of(schema)})"
            raise InvalidInputError(self.name, {f"messages.{name}": problem})
        declared = self.messages[name].schema
        if schema is not MISSING and schema != declared.annotation:
            raise SpecError(
                f"{self.name} waits for the message {name!r} with schema={_code_of(schema)}, and declares it with the "
                f"type {_code_of(declared.annotation)}; say the same in both places, or leave schema= away"
            )

    def read_message(self, name: str, value: Any) -> Any:
        """The value of a message, converted to its type; `InvalidInputError` if it does not fit or is not declared."""
        self.check_message(name)
        problems = Problems()
        value = self.messages[name].schema.read_into(value, f"messages.{name}", problems)
        if problems:
            raise InvalidInputError(self.name, problems)
        return value

    def describe(self) -> dict[str, Any]:
        """The spec as plain data, for people and tools."""
        return {
            "name": self.name,
            "inputs": self.inputs.describe(),
            "outputs": self.outputs.describe(),
            "messages": {name: port.describe() for name, port in self.messages.items()},
            "exit_codes": [
                {"status": code.status, "label": code.label, "message": code.message} for code in self.exit_codes
            ],
        }


# --- building it ----------------------------------------------------------------------------------------

_building: contextvars.ContextVar[tuple[type[Process], ...]] = contextvars.ContextVar("prunus_building", default=())
"""The classes whose specs are being built, each for the sake of the next."""


def build(process_class: type[Process]) -> ProcessSpec:
    """The complete, frozen spec of a class. Raises `SpecError`."""
    outer = _building.get()
    if process_class in outer:
        circle = " -> ".join(cls.__qualname__ for cls in (*outer[outer.index(process_class) :], process_class))
        raise SpecError(f"these classes expose each other in a circle: {circle}")
    token = _building.set((*outer, process_class))
    try:
        return _build(process_class)
    finally:
        _building.reset(token)


def _build(process_class: type[Process]) -> ProcessSpec:
    spec = process_class.spec_class(process_class.__qualname__)
    names = dict(vars(process_class))
    inputs, outputs, messages = (getattr(process_class, name, None) for name in ("Inputs", "Outputs", "Messages"))
    said_inputs, said_outputs = types_said(process_class)
    inputs, outputs = inputs or said_inputs, outputs or said_outputs
    if inputs is not None:
        spec._input_model = _add_model(spec.inputs, inputs, InputPort, process_class, names)
    if outputs is not None:
        spec._output_model = _add_model(spec.outputs, outputs, OutputPort, process_class, names)
    if messages is not None:
        where = f"{process_class.__qualname__}.Messages"
        for field in model_fields(messages, where, names):
            spec.message(field.name, valid_type=field.annotation, help=field.help)
    process_class.define(spec)
    spec.complete(process_class)
    return spec


@dataclass(frozen=True, slots=True)
class _Model:
    """A nested class `Inputs` or `Outputs`: what it says of the values together."""

    kind: type[Any]
    fields: tuple[Field, ...]
    converts: bool
    """Whether the values are what the instance holds, and not what was given to it."""
    names: frozenset[str] | None = None
    """Its ports, if there are others beside them."""

    def within(self, space: PortNamespace) -> _Model:
        own = frozenset(field.name for field in self.fields)
        return self if own == space.ports.keys() else _Model(self.kind, self.fields, self.converts, own)

    def build(self, values: Mapping[str, Any], path: str, problems: Problems) -> Any:
        if self.names is not None:
            values = {name: value for name, value in values.items() if name in self.names}
        return build_model(self.kind, values, path, problems)


def _fill(space: PortNamespace, model: _Model | None, given: Any, path: str, problems: Problems) -> tuple[Any, Any]:
    """The values, complete, and the instance of the model that they make."""
    filled = space.fill(given, path, problems)
    if model is None or filled is MISSING or (problems and not model.converts):
        return filled, None
    found = Problems()
    instance = model.build(filled, path, found)
    for place, problem in found.items():
        if not any(place == known or place.startswith(f"{known}.") for known in problems):
            problems[place] = problem
    if problems:
        return filled, None
    if model.converts:
        filled = {**filled, **fields_of(instance)}
    return filled, instance


def _add_model(
    space: PortNamespace, kind: Any, port_kind: type[Port], process_class: type[Process], names: Mapping[str, Any]
) -> _Model:
    """Make ports of the fields of a class."""
    where = f"{process_class.__qualname__}.{getattr(kind, '__name__', kind)}"
    fields = model_fields(kind, where, names)
    converts = model_kind(kind) == "pydantic"
    for field in fields:
        if converts:
            # The model itself checks, converts and makes defaults.
            shown = None if field.required else "made by the model" if field.factory else brief(field.default)
            port = port_kind(
                field.name,
                Schema.unchecked(field.annotation),
                required=field.required,
                help=field.help,
                metadata=field.metadata,
                shown_default=shown,
            )
        else:
            default: Any = MISSING
            if field.factory is not None:
                default = field.factory
            elif not field.required:
                default = _constant(field.default) if callable(field.default) else field.default
            port = port_kind(
                field.name,
                Schema(field.annotation, f"{where}.{field.name}", reads=False),
                default=default,
                help=field.help,
                metadata=field.metadata,
            )
        space.add(field.name, port)
    return _Model(kind, fields, converts)


def _code_of(annotation: Any) -> str:
    """An annotation as one writes it."""
    return annotation.__qualname__ if isinstance(annotation, type) else str(annotation)


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _define_namespace(
    root: PortNamespace,
    name: str,
    required: bool | Missing,
    dynamic: bool | Missing,
    valid_type: Any,
    validator: Validator | Missing | None,
    help: str | Missing | None,
    metadata: Mapping[str, Any] | Missing | None,
) -> None:
    options = {
        "required": required,
        "dynamic": dynamic,
        "valid_type": valid_type,
        "validator": validator,
        "help": help,
        "metadata": metadata,
    }
    root.space(name)[0].configure(name, options)


def _paths(word: str, given: Iterable[str] | None, where: str) -> tuple[str, ...] | None:
    if isinstance(given, str):
        raise SpecError(f"{where}: {word} takes a list of names; write {word}=[{given!r}]")
    return None if given is None else tuple(given)


def _refuse_unnamed_fields(label: str, message: str) -> None:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(message) if field is not None]
    except ValueError as error:
        raise SpecError(f"the message of {label} can't be filled in ({error}); write {{{{ for a brace") from error
    if not all(field.partition(".")[0].partition("[")[0].isidentifier() for field in fields):
        raise SpecError(f"the message of {label} has a field without a name; write {{name}}, and {{{{ for a brace")


# --- picking what was exposed ---------------------------------------------------------------------------


def _exposure(spec: ProcessSpec, kind: str, process_class: type[Process], namespace: str | None) -> Exposure:
    try:
        return spec.exposures[kind, namespace, process_class]
    except KeyError:
        known = [
            f"those of {cls.__qualname__}" + (f" in {space!r}" if space else "")
            for what, space, cls in spec.exposures
            if what == kind
        ]
        where = f" in {namespace!r}" if namespace else ""
        raise SpecError(
            f"{spec.name} does not expose the {kind} of {process_class.__qualname__}{where}; it exposes: "
            f"{', '.join(known) or 'none'}"
        ) from None


def pick_exposed(values: Mapping[str, Any], exposure: Exposure, ports: Iterable[str]) -> dict[str, Any]:
    """Of `values` those that belong to `exposure`, in plain dictionaries; `ports` are the names that have a port."""
    picked: dict[str, Any] = {}
    for path in exposure.paths:
        *on_the_way, name = path.split(".")
        source, target = values, picked
        for segment in on_the_way:
            source = source.get(segment) or {}
        if name in source:
            for segment in on_the_way:
                target = target.setdefault(segment, {})
            target[name] = _plain_copy(source[name])
    if exposure.others:
        known = frozenset(ports)
        picked.update((name, _plain_copy(value)) for name, value in values.items() if name not in known)
    return picked


def _plain_copy(value: Any) -> Any:
    return thaw(value) if isinstance(value, FrozenNamespace) else value


def _leaves(values: Mapping[str, Any], space: PortNamespace) -> Iterator[tuple[str, Any]]:
    """The values of ports by their dotted paths."""
    for name, value in values.items():
        port = space.ports.get(name)
        if isinstance(port, PortNamespace) and isinstance(value, Mapping):
            yield from ((f"{name}.{path}", item) for path, item in _leaves(value, port))
        else:
            yield name, value
