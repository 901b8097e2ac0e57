"""Inputs, outputs and nodes: what a schema says, with the checks that ComfyUI makes of it."""

from dataclasses import dataclass, field


class _Input:
    widget = True

    def __init__(self, id, display_name=None, optional=False, tooltip=None, default=None):
        self.id, self.optional, self.tooltip, self.default = id, optional, tooltip, default

    def check(self, value):
        """Raises what ComfyUI refuses a workflow for."""


class _Number(_Input):
    kind: type

    def __init__(
        self,
        id,
        default=None,
        min=None,
        max=None,
        step=None,
        control_after_generate=None,
        optional=False,
        tooltip=None,
    ):
        super().__init__(id, optional=optional, tooltip=tooltip, default=default)
        self.min, self.max, self.step = min, max, step
        self.control_after_generate = control_after_generate

    def check(self, value):
        assert not isinstance(value, bool) and isinstance(value, self.kind), (self.id, value)
        assert self.min <= value <= self.max, (self.id, value)


class _Slot(_Input):
    widget = False

    def check(self, value):
        raise AssertionError(f"{self.id} must be linked, got {value!r}")


def _type(name, base=_Slot):
    class Output:
        io_type = name

        def __init__(self, id=None, display_name=None, tooltip=None):
            self.id, self.display_name = id, display_name

    return type(name, (), {"Input": type("Input", (base,), {"io_type": name}), "Output": Output})


class _Whole(_Number):
    kind = int


class _Real(_Number):
    kind = (int, float)


class _Text(_Input):
    def __init__(self, id, multiline=False, default=None, optional=False, tooltip=None):
        super().__init__(id, optional=optional, tooltip=tooltip, default=default)

    def check(self, value):
        assert isinstance(value, str), (self.id, value)


class _Switch(_Input):
    def check(self, value):
        assert isinstance(value, bool), (self.id, value)


class _Choice(_Input):
    def __init__(self, id, options=None, default=None, optional=False, tooltip=None):
        super().__init__(id, optional=optional, tooltip=tooltip, default=default)
        self.options = options

    def check(self, value):
        assert value in self.options, (self.id, value)


Boolean = _type("BOOLEAN", _Switch)
Combo = _type("COMBO", _Choice)
Float = _type("FLOAT", _Real)
Image = _type("IMAGE")
Int = _type("INT", _Whole)
Mask = _type("MASK")
String = _type("STRING", _Text)


def Custom(name):
    return _type(name)


@dataclass
class Schema:
    node_id: str
    display_name: str = None
    category: str = "sd"
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    description: str = ""
    is_output_node: bool = False
    not_idempotent: bool = False

    def __post_init__(self):
        ids = [one.id for one in self.inputs]
        assert len(set(ids)) == len(ids), ids


class ComfyNode:
    pass


class NodeOutput:
    def __init__(self, *args):
        self.args = args
