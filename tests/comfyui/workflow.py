"""Workflows: their two forms, checked against the schemas, and carried out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[2] / "examples/comfyui"
NAMES = sorted(path.name.removesuffix(".api.json") for path in FOLDER.glob("*.api.json"))
# Of ComfyUI's own nodes in the workflows: links, widgets in their order, types of outputs.
CORE: dict[str, tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]] = {
    "SaveImage": ({"images": "IMAGE"}, ("filename_prefix",), ()),
    "PreviewImage": ({"images": "IMAGE"}, (), ()),
    "PreviewAny": ({"source": "*"}, (), ()),
    "SolidMask": ({}, ("value", "width", "height"), ("MASK",)),
    "MaskComposite": (
        {"destination": "MASK", "source": "MASK"},
        ("x", "y", "operation"),
        ("MASK",),
    ),
}


def read(name: str) -> dict[str, Any]:
    """A workflow as it is queued."""
    return json.loads((FOLDER / f"{name}.api.json").read_text())


def drawn(name: str) -> dict[str, Any]:
    """A workflow as the page draws it."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def outputs(kind: str, nodes: dict[str, Any]) -> list[str]:
    if kind in CORE:
        return list(CORE[kind][2])
    return [one.io_type for one in nodes[kind].define_schema().outputs]


def slots(kind: str, nodes: dict[str, Any]) -> tuple[dict[str, str], dict[str, bool], set[str]]:
    """Types of inputs that are linked; widgets, and whether another follows; what may be absent."""
    if kind in CORE:
        links, widgets, _ = CORE[kind]
        return links, dict.fromkeys(widgets, False), set()
    inputs = nodes[kind].define_schema().inputs
    return (
        {one.id: one.io_type for one in inputs if not one.widget},
        {one.id: bool(getattr(one, "control_after_generate", 0)) for one in inputs if one.widget},
        {one.id for one in inputs if one.optional},
    )


def check(flow: dict[str, Any], nodes: dict[str, Any]) -> None:
    """Raises AssertionError where ComfyUI would refuse a workflow."""
    for key, node in flow.items():
        kind, given = node["class_type"], node["inputs"]
        links, widgets, optional = slots(kind, nodes)
        assert given.keys() <= links.keys() | widgets.keys(), (key, given.keys())
        assert (links.keys() | widgets.keys()) - optional <= given.keys(), key
        for name, value in given.items():
            if isinstance(value, list):
                source, place = value
                found = outputs(flow[source]["class_type"], nodes)[place]
                assert links[name] in (found, "*"), (key, name)
            elif kind in nodes:
                (one,) = (one for one in nodes[kind].define_schema().inputs if one.id == name)
                one.check(value)


def queued(ui: dict[str, Any], nodes: dict[str, Any]) -> dict[str, Any]:
    """What the page queues of the workflow that it draws, titles apart."""
    sources = {number: [str(node), place] for number, node, place, *_ in ui["links"]}
    found = {}
    for node in ui["nodes"]:
        _, widgets, _ = slots(node["type"], nodes)
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for name, is_controlled in widgets.items():
            inputs[name] = next(values)
            if is_controlled:
                assert next(values) in ("fixed", "increment", "decrement", "randomize")
        assert not list(values), node["id"]
        for slot in node["inputs"]:
            if slot["link"] is not None:
                inputs[slot["name"]] = sources[slot["link"]]
        found[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return found


def run(flow: dict[str, Any], nodes: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The outputs of every node, in the order of the file; ComfyUI runs nodes in inference mode."""
    made: dict[str, tuple[Any, ...]] = {}
    with torch.inference_mode():
        for key, node in flow.items():
            kind = node["class_type"]
            given = {
                name: made[value[0]][value[1]] if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            }
            made[key] = nodes[kind].execute(**given).args if kind in nodes else _core(kind, given)
    return made


def _core(kind: str, given: dict[str, Any]) -> tuple[Any, ...]:
    if kind == "SolidMask":
        return (torch.full((1, given["height"], given["width"]), given["value"]),)
    if kind == "MaskComposite":
        mask, source = given["destination"].clone(), given["source"]
        assert given["operation"] == "add"
        rows, columns = source.shape[1:]
        mask[:, given["y"] : given["y"] + rows, given["x"] : given["x"] + columns] += source
        return (mask.clamp(0, 1),)
    return ()
