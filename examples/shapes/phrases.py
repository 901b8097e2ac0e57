"""How people ask: any order of words, politeness, attributes left out, several short sentences.

The wordings of `tasks` state every attribute in one of a few orders. Training mixes these in, so
that a model follows a prompt that nobody wrote for it. Colour, size or background that a prompt
leaves out, the picture has at random, since the scenes are drawn before the words; a place is left
out where it is the one that `tasks.places_of` gives.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from .scenes import Scene, Thing
from .tasks import ALL_STATED, EDITS, Stated, Task, places_of

# How many of a kind's training prompts are from here; "mask" and "pair" have few ways to be said.
SHARE = {"text": 0.7, **dict.fromkeys(EDITS, 0.6), "subject": 0.4, "compose": 0.4, "mask": 0.4}
UNKNOWN_SHARE = 0.2  # of them with words that the tokenizer does not know
_UNKNOWN = "xyzzy"

SHAPES = {
    "circle": ["circle", "circle", "disc", "disk", "ball", "dot", "round shape"],
    "square": ["square", "square", "box", "block", "cube"],
    "triangle": ["triangle"],
    "star": ["star"],
}
SIZES = {
    "small": ["small", "small", "little", "tiny"],
    "large": ["large", "large", "big", "huge"],
}
_GROUND_ADJECTIVES = {
    "gray": ["gray", "grey"],
    "striped": ["striped", "striped", "stripy"],
    "checkered": ["checkered", "checkered", "chequered", "checked", "checkerboard"],
    "meadow": ["meadow", "meadow", "grass", "grassy"],
}
_GROUND_NOUNS = {
    "gray": ["gray", "grey"],
    "striped": ["stripes"],
    "checkered": ["a checkerboard", "checks"],
    "meadow": ["a meadow", "grass", "a lawn"],
}
_ROWS = (("top", "top", "upper"), ("bottom", "bottom", "lower"))
_COLUMNS = ("left", "right")
_FILLERS = ("nice", "simple", "bright", "plain", "pretty", "beautiful", "lovely", "single")
_TAGS = [f"<img><|image_{number}|></img>" for number in (1, 2, 3)]


def synonyms() -> list[list[str]]:
    """Words that mean the same; the first of each is one of `tasks`' own."""
    groups = [*SHAPES.values(), *SIZES.values(), *(list(group) for group in _ROWS)]
    grounds = {name: [name, *_GROUND_ADJECTIVES[name]] for name in _GROUND_ADJECTIVES}
    for name, nouns in _GROUND_NOUNS.items():
        grounds[name] += [noun.split()[-1] for noun in nouns]
    return [
        *groups,
        *grounds.values(),
        ["background", "backdrop"],
        ["color", "colour"],
        ["remove", "hide", "drop"],
        ["move", "shift", "bring", "push"],
        ["add", "insert"],
    ]


def words(task: Task, rng: random.Random) -> str:
    """A prompt for a task: one of `tasks`' wordings or, of `SHARE`, one from here."""
    if rng.random() >= SHARE.get(task.kind, 0):
        return task.words(rng)
    text = free_words(task, rng)
    return _with_unknown(rng, text) if rng.random() < UNKNOWN_SHARE else text


def free_words(task: Task, rng: random.Random) -> str:
    """A prompt in one of the wordings of this module, for a task of a kind in `SHARE`."""
    if task.kind == "text":
        return _finished(rng, _text(rng, task.target))
    if task.kind in EDITS:
        return _edit(rng, task)
    return _finished(rng, _OTHERS[task.kind](rng, task))


# ---------------------------------------------------------------- parts of sentences


def _colour(rng: random.Random, colour: str) -> str:
    return rng.choice(["purple", "violet"]) if colour == "purple" else colour


def _adjective(rng: random.Random, ground: str) -> str:
    return rng.choice(_GROUND_ADJECTIVES.get(ground, [ground]))


def _ground_noun(rng: random.Random, ground: str) -> str:
    return rng.choice(_GROUND_NOUNS.get(ground, [ground]))


def _a(text: str) -> str:
    return f"an {text}" if text[0] in "aeiou" else f"a {text}"


def _noun(rng: random.Random, thing: Thing, stated: Stated = ALL_STATED) -> str:
    """Such as "a red small circle", "one circle that is red", "big box in red"."""
    shape = rng.choice(SHAPES[thing.shape])
    colour = _colour(rng, thing.colour) if stated.colour else ""
    size = rng.choice(SIZES[thing.size]) if stated.size else ""
    before = [word for word in (size, colour) if word]
    behind = ""
    if before and rng.random() < 0.14:
        if colour and rng.random() < 0.4:
            before, behind = [size] * bool(size), f" in {colour}"
        else:
            rng.shuffle(before)
            form = rng.choice([" that is {}", " which is {}", ", {},", ", {},"])
            behind = form.format(rng.choice([" and ", ", "]).join(before))
            before = []
    elif rng.random() < 0.3:
        before.reverse()
    if rng.random() < 0.07:
        before.insert(rng.randrange(len(before) + 1), rng.choice(_FILLERS))
    text = " ".join([*before, shape]) + behind
    kind = rng.random()
    if kind < 0.68:
        return _a(text)
    return (
        text
        if kind < 0.84
        else f"{rng.choice(['one', 'one', 'the', 'this', 'another', '1'])} {text}"
    )


def _corner(rng: random.Random, place: int) -> str:
    row, column = divmod(place, 2)
    if rng.random() < 0.06:
        return f"{_COLUMNS[column]} {_ROWS[row][0]}"
    return f"{rng.choice(_ROWS[row])}{rng.choice([' ', ' ', ' ', ' ', '-'])}{_COLUMNS[column]}"


def _place(rng: random.Random, place: int, part: str = "both") -> str:
    """Such as "in the upper left corner", or what names a row or a column alone."""
    row, column = divmod(place, 2)
    if part == "row":
        name = _ROWS[row][0]
        side = rng.choice(_ROWS[row])
        return rng.choice([f"at the {name}", f"near the {name}", f"in the {side} half", name])
    if part == "column":
        name = _COLUMNS[column]
        return rng.choice(
            [
                *[
                    f"on the {name}",
                    f"on the {name} side",
                    f"at the {name}",
                    f"to the {name}",
                    name,
                ],
                f"on the {name}{rng.choice([' ', '-'])}hand side",
            ]
        )
    corner = _corner(rng, place)
    if rng.random() < 0.2:
        return rng.choice([corner, f"{corner} corner"])
    preposition = rng.choice(["at", "in", "in", "on", "near", "to"])
    whole = f" of the {rng.choice(['picture', 'image'])}" if rng.random() < 0.06 else ""
    return f"{preposition} the {corner}{rng.choice(['', ' corner'])}{whole}"


def _placed(rng: random.Random, thing: Thing, stated: Stated) -> str:
    """A thing with what is stated of its place, before or behind it."""
    noun = _noun(rng, thing, stated)
    if not stated.place:
        return noun.rstrip(",")
    place = _place(rng, thing.place, stated.place)
    if noun.endswith(","):
        return f"{noun} {place}"
    return rng.choice(
        [
            *[f"{noun} {place}"] * 6,
            f"{noun}, {place}",
            f"{noun} ({place})",
            f"{noun} {rng.choice(['placed', 'located', 'sitting', 'standing', 'that is'])} {place}",
            f"{place} {noun}",
            f"{place}, {noun}",
            f"{place}: {noun}",
            f"{place} {rng.choice(['there is', 'is', 'we see', 'you see'])} {noun}",
        ]
    )


def _ground_tail(rng: random.Random, ground: str) -> str:
    """What follows the things; begins with its comma or space."""
    adjective, noun = _adjective(rng, ground), _ground_noun(rng, ground)
    behind = rng.choice(["background", "background", "background", "backdrop"])
    return rng.choice(
        [
            *[f" on {_a(adjective)} {behind}"] * 3,
            *[f" on {noun}"] * 2,
            f" on {adjective} {behind}",
            f" against {_a(adjective)} {behind}",
            f" in front of {_a(adjective)} {behind}",
            f" over {_a(adjective)} {behind}",
            f" with {_a(adjective)} {behind}",
            f" and {_a(adjective)} {behind}",
            f", {adjective} {behind}",
            f", background {adjective}",
            f", with {noun} {rng.choice(['as the background', 'behind it', 'in the background'])}",
            f", {rng.choice(['all ', ''])}on {noun}",
        ]
    )


def _ground_head(rng: random.Random, ground: str) -> str:
    """What leads to the things; ends with a space."""
    adjective, noun = _adjective(rng, ground), _ground_noun(rng, ground)
    return rng.choice(
        [
            f"on {_a(adjective)} background, ",
            f"on {_a(adjective)} background ",
            f"on {noun}, ",
            f"on {noun} there is ",
            f"against {_a(adjective)} background, ",
            f"{adjective} background with ",
            f"{_a(adjective)} background with ",
            f"{_a(adjective)} background and ",
            f"{adjective} background, ",
            f"{adjective} background. ",
            f"background: {adjective}. ",
            f"{noun} with ",
        ]
    )


def _ground_sentence(rng: random.Random, ground: str) -> str:
    adjective, noun = _adjective(rng, ground), _ground_noun(rng, ground)
    return rng.choice(
        [
            f"the background is {adjective}",
            f"the background is {noun}",
            f"the background should be {adjective}",
            f"{adjective} background",
            f"{_a(adjective)} background",
            f"background: {adjective}",
            f"use {_a(adjective)} background",
            f"make the background {adjective}",
        ]
    )


def _polite(rng: random.Random, text: str, chance: float = 0.25) -> str:
    """A request as one says it to somebody."""
    if rng.random() >= chance:
        return text
    return rng.choice(
        [
            f"please {text}",
            f"please {text}",
            f"{text} please",
            f"{text}, please",
            f"can you {text}",
            f"could you {text}",
            f"could you please {text}",
            f"can you please {text}",
            f"would you {text}",
            f"hello, {text}",
            f"could i have {text}" if rng.random() < 0.3 else f"i want you to {text}",
            f"hi, please {text}",
            f"{text}, thanks",
            f"{text}. thank you",
            f"now {text}",
        ]
    )


def _finished(rng: random.Random, text: str) -> str:
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text.rstrip(" ,") + rng.choice(["", "", ".", ".", "!" if rng.random() < 0.3 else ""])


def _with_unknown(rng: random.Random, text: str) -> str:
    """With words that mean nothing, as those that nobody foresaw: beside others, or as a verb."""
    pieces = text.split(" ")
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
        spots = [i for i, piece in enumerate(pieces) if piece.lower() in _REPLACEABLE]
        if spots and rng.random() < 0.4:
            pieces[rng.choice(spots)] = _UNKNOWN
        else:
            pieces.insert(rng.randrange(len(pieces) + 1), _UNKNOWN)
    return " ".join(pieces)


# Words that say nothing, and verbs that the rest of their sentence implies.
_REPLACEABLE = frozenset(
    "a an the of me please there is are it with i want would like can could you we see "  # noqa: SIM905
    "draw show make paint create add put place insert include move shift bring push turn "
    "change set swap remove delete erase hide drop should".split()
)


# ---------------------------------------------------------------- text to image


def _text(rng: random.Random, scene: Scene) -> str:
    ground = scene.background if not scene.things or rng.random() < 0.75 else ""
    if not scene.things:
        adjective = _adjective(rng, ground)
        empty = rng.choice(
            [
                f"just {_a(adjective)} background",
                f"only {_a(adjective)} background",
                f"nothing but {_ground_noun(rng, ground)}",
                f"{adjective} background without anything on it",
                f"an empty {adjective} picture",
            ]
        )
        return _polite(rng, _framed(rng, empty))
    things = list(zip(scene.things, _stated(rng, scene)))
    rng.shuffle(things)
    things = _where_implied(things)
    if len(things) == 1 and rng.random() < 0.12:
        return _in_sentences(rng, *things[0], ground)
    if len(things) == 2 and rng.random() < 0.08:
        related = _related(rng, scene.things)
        if related:
            return _polite(
                rng, _framed(rng, related + (_ground_tail(rng, ground) if ground else ""))
            )
    parts = [_placed(rng, *one) for one in things]
    if rng.random() < 0.15:  # short sentences
        parts = [rng.choice([part, part, f"there is {part}"]) for part in parts]
        if ground:
            parts.insert(rng.choice([0, len(parts), len(parts)]), _ground_sentence(rng, ground))
        return ". ".join(parts)
    joined = _joined(rng, parts)
    if not ground:
        return _polite(rng, _framed(rng, joined))
    form = rng.random()
    if form < 0.6:
        return _polite(rng, _framed(rng, joined + _ground_tail(rng, ground)))
    if form < 0.8:
        return _polite(rng, _framed(rng, _ground_head(rng, ground) + joined))
    return f"{_polite(rng, _framed(rng, joined))}. {_ground_sentence(rng, ground)}"


def _stated(rng: random.Random, scene: Scene) -> list[Stated]:
    """Mostly the same of both things."""
    form = rng.random()
    place = "both" if form < 0.55 else "" if form < 0.88 else rng.choice(["row", "column"])
    size, colour = rng.random() < 0.6, rng.random() < 0.93
    found = []
    for _ in scene.things:
        if rng.random() < 0.15:
            place, size = rng.choice(["both", ""]), rng.random() < 0.5
        found.append(Stated(size, colour, place))
    return found


def _where_implied(things: list[tuple[Thing, Stated]]) -> list[tuple[Thing, Stated]]:
    """In an order that implies the places that are not stated; else all are."""
    for order in (things, things[::-1]):
        if places_of([(stated.place, thing.place) for thing, stated in order]) == [
            thing.place for thing, _ in order
        ]:
            return order
    return [(thing, replace(stated, place="both")) for thing, stated in things]


def _joined(rng: random.Random, parts: Sequence[str]) -> str:
    if len(parts) == 1:
        only = rng.choice(["just {}", "only {}", "{} and nothing else", "a single shape: {}"])
        return only.format(parts[0]) if rng.random() < 0.06 else parts[0]
    between = [" and "] * 5 + [", "] * 3 + [" with ", " plus ", ", and ", " and also ", "; "]
    text = rng.choice(between).join(parts)
    return rng.choice([text] * 9 + [f"two shapes: {text}", f"two things, {text}", f"both {text}"])


def _related(rng: random.Random, things: Sequence[Thing]) -> str:
    """How one stands to the other, in the first row or column; else nothing."""
    one, two = things
    if min(one.place, two.place) != 0:
        return ""
    (row, column), (other_row, other_column) = divmod(one.place, 2), divmod(two.place, 2)
    first = _noun(rng, one, Stated(rng.random() < 0.5)).rstrip(",")
    second = _noun(rng, two, Stated(rng.random() < 0.5)).rstrip(",")
    if row == other_row:
        side = _COLUMNS[column]
        relation = rng.choice(["next to", "beside", f"to the {side} of", f"{side} of"])
    elif column == other_column:
        relation = rng.choice(["above", "over"] if row < other_row else ["below", "under"])
    else:
        return ""
    return f"{first} {relation} {second}"


def _framed(rng: random.Random, content: str) -> str:
    """Such as "draw me a picture of ..."."""
    form = rng.random()
    if form < 0.35:
        return content
    article = rng.choice(["a ", "a ", "an "]) if form < 0.9 else ""
    name = rng.choice(["picture", "picture", "drawing", "photo", "scene"])
    if article == "an ":
        name = rng.choice(["image", "illustration"])
    of = f"{article}{name} {rng.choice(['of', 'of', 'with', 'that shows', 'showing'])} {content}"
    if form < 0.5:
        return of
    if form < 0.6:
        return f"{rng.choice(['there is', 'there are', 'we see', 'here is', 'it shows'])} {content}"
    verb = rng.choice(
        [
            *["draw", "draw", "draw me", "paint", "show", "show me", "make", "make me", "create"],
            *[
                "generate",
                "render",
                "give me",
                "i want",
                "i would like",
                "i'd like",
                "i need",
                "how about",
                "what about",
                "imagine",
                "let me see",
            ],
        ]
    )
    return f"{verb} {of if rng.random() < 0.25 else content}"


def _in_sentences(rng: random.Random, thing: Thing, stated: Stated, ground: str) -> str:
    """Such as "Draw a star. It is red and large. It stands at the top left."."""
    says = []
    if stated.colour:
        says.append(_colour(rng, thing.colour))
    if stated.size:
        says.append(rng.choice(SIZES[thing.size]))
    rng.shuffle(says)
    noun = _noun(rng, thing, Stated(size=False, colour=False)).rstrip(",")
    sentences = [_polite(rng, _framed(rng, noun))]
    it = rng.choice(["it", "it", "it", f"the {noun.split(' ', 1)[-1]}"])
    verb = rng.choice(["is", "is", "should be"])
    if says:
        sentences.append(f"{it} {verb} {' and '.join(says)}")
    if stated.place:
        sentences.append(f"{it} {verb} {_place(rng, thing.place, stated.place)}")
    if ground:
        sentences.append(_ground_sentence(rng, ground))
    return ". ".join(sentences)


# ---------------------------------------------------------------- edits


def _which(rng: random.Random, thing: Thing, scene: Scene) -> str:
    """A thing of a picture, by what it alone has there."""
    shape, colour = rng.choice(SHAPES[thing.shape]), _colour(rng, thing.colour)
    size = rng.choice(SIZES[thing.size])
    kind = rng.choice(["shape", "object", "thing", "one"])
    names = [
        *[f"the {shape}"] * 3,
        *[f"the {colour} {shape}"] * 3,
        f"the {colour} {kind}",
        f"the {size} {shape}",
        f"the {size} {colour} {shape}",
        f"the {shape} {_place(rng, thing.place)}",
        f"the {kind} {_place(rng, thing.place)}",
    ]
    others = [one for one in scene.things if one != thing]
    if not others:
        names += ["it", "it", "the shape", "the object"]
    elif others[0].size != thing.size:
        names.append(f"the {size} {kind}")
    if others and others[0].place % 2 != thing.place % 2:
        names.append(f"the {kind} on the {_COLUMNS[thing.place % 2]}")
    return rng.choice(names)


def _edit(rng: random.Random, task: Task) -> str:
    (before,), after = task.inputs, task.target
    gone = [thing for thing in before.things if thing not in after.things]
    new = [thing for thing in after.things if thing not in before.things]
    say: dict[str, Callable[[], str]] = {
        "background": lambda: _say_background(rng, before, after),
        "add": lambda: _say_add(rng, new[0], before),
        "remove": lambda: _say_remove(rng, _which(rng, gone[0], before)),
        "move": lambda: _say_move(rng, gone[0], new[0], before),
        "recolour": lambda: _say_recolour(rng, gone[0], new[0], before),
    }
    text = say[task.kind]()
    tag, form = _TAGS[0], rng.random()
    if form < 0.7:
        return f"{tag}{rng.choice([' ', ' ', ': ', ', '])}{_finished(rng, text)}"
    if form < 0.8:
        return f"{_finished(rng, text)} {tag}"
    inside = rng.choice(["in", "in", "edit", "take", "look at"])
    return (
        f"{inside} {tag}{rng.choice([' ', ', '])}{'and ' * (inside != 'in')}{_finished(rng, text)}"
    )


def _wished(rng: random.Random, imperative: str, state: str) -> str:
    """What to do, or how it is to be: "move it to ..." or "it should be ..."."""
    if rng.random() < 0.75:
        return _polite(rng, imperative)
    return state


def _say_background(rng: random.Random, before: Scene, after: Scene) -> str:
    adjective, noun = _adjective(rng, after.background), _ground_noun(rng, after.background)
    old = _adjective(rng, before.background)
    imperative = rng.choice(
        [
            f"make the background {adjective}",
            f"make the background {noun}",
            f"turn the background {adjective}",
            f"set the background to {adjective}",
            f"change the background to {noun}",
            f"change the background from {old} to {adjective}",
            f"replace the background with {_a(adjective)} one",
            f"replace the {old} background with {noun}",
            f"swap the background for {noun}",
            f"use {noun} as the background",
            f"give it {_a(adjective)} background",
            f"put {rng.choice(['it', 'everything', 'this'])} on {_a(adjective)} background",
            f"put {rng.choice(['it', 'everything', 'this'])} on {noun}",
            f"paint the background {adjective}",
        ]
    )
    state = rng.choice(
        [
            f"the background should be {adjective}",
            f"i want {_a(adjective)} background",
            f"{adjective} background",
            f"{adjective} background please",
            f"the same with {_a(adjective)} background",
            f"the same on {noun}",
            f"with {_a(adjective)} background instead",
            f"background {adjective}",
        ]
    )
    return _wished(rng, imperative, state)


def _say_add(rng: random.Random, new: Thing, before: Scene) -> str:
    part = "both" if rng.random() < 0.4 else rng.choice(["", "", "row", "column"])
    there = [("both", thing.place) for thing in before.things]
    place = part if places_of([*there, (part, new.place)])[-1] == new.place else "both"
    stated = Stated(rng.random() < 0.65, rng.random() < 0.95, place)
    noun = _noun(rng, new, stated).rstrip(",")
    where = f" {_place(rng, new.place, place)}" if place else ""
    verb = rng.choice(["add", "add", "put", "draw", "place", "insert", "also draw", "include"])
    imperative = rng.choice([f"{verb} {noun}{where}"] * 3 + [f"{verb}{where} {noun}"])
    state = rng.choice(
        [
            f"there should be {noun}{where}",
            f"there should also be {noun}{where}",
            f"i want {noun}{where}",
            f"i would also like {noun}{where}",
            f"and {noun}{where}",
            f"with {noun}{where}",
            f"also {noun}{where}",
            f"the same with {noun}{where}",
        ]
    )
    return _wished(rng, imperative, state)


def _say_remove(rng: random.Random, which: str) -> str:
    imperative = rng.choice(
        [
            *[f"{rng.choice(['remove', 'delete', 'erase', 'hide', 'drop'])} {which}"] * 4,
            f"get rid of {which}",
            f"take away {which}",
            f"take {which} away",
            f"take {which} out",
            f"make {which} disappear",
            f"leave out {which}",
        ]
    )
    state = rng.choice(
        [
            f"without {which}",
            f"the same without {which}",
            f"i do not want {which}",
            f"i don't want {which}",
            f"{which} should be gone",
            f"{which} must go",
            f"there should be no {which.removeprefix('the ')}",
            f"no {which.removeprefix('the ')}" if which.startswith("the ") else f"without {which}",
        ]
    )
    return _wished(rng, imperative, state)


def _say_move(rng: random.Random, old: Thing, new: Thing, scene: Scene) -> str:
    which = _which(rng, old, scene)
    (row, column), (new_row, new_column) = divmod(old.place, 2), divmod(new.place, 2)
    if row == new_row and rng.random() < 0.3:
        to = rng.choice([f"to the {_COLUMNS[new_column]}", f"{_COLUMNS[new_column]}"])
        return _polite(rng, f"{rng.choice(['move', 'shift', 'push'])} {which} {to}")
    if column == new_column and rng.random() < 0.3:
        to = rng.choice(["up", "to the top"] if new_row < row else ["down", "to the bottom"])
        return _polite(rng, f"{rng.choice(['move', 'shift', 'push'])} {which} {to}")
    corner = _corner(rng, new.place) + rng.choice(["", " corner"])
    imperative = rng.choice(
        [
            *[f"{rng.choice(['move', 'shift', 'bring', 'push'])} {which} to the {corner}"] * 3,
            f"put {which} {_place(rng, new.place)}",
            f"place {which} {_place(rng, new.place)}",
            f"move {which} into the {corner}",
            f"move {which} over to the {corner}",
        ]
    )
    state = rng.choice(
        [
            f"{which} should be {_place(rng, new.place)}",
            f"i want {which} {_place(rng, new.place)}",
            f"{which} belongs in the {corner}",
            f"{which} goes to the {corner}",
        ]
    )
    return _wished(rng, imperative, state)


def _say_recolour(rng: random.Random, old: Thing, new: Thing, scene: Scene) -> str:
    which, colour = _which(rng, old, scene), _colour(rng, new.colour)
    was, shape = _colour(rng, old.colour), rng.choice(SHAPES[old.shape])
    word = rng.choice(["color", "colour"])
    imperative = rng.choice(
        [
            *[f"{rng.choice(['make', 'turn', 'paint', 'color', 'colour'])} {which} {colour}"] * 3,
            f"change {which} to {colour}",
            f"recolor {which} to {colour}",
            f"recolor {which} {colour}",
            f"change the {word} of {which} to {colour}",
            f"change the {shape}'s {word} to {colour}",
            f"set the {word} of {which} to {colour}",
            f"give {which} the {word} {colour}",
            f"replace the {was} {shape} with {_a(colour)} one",
            f"change {was} to {colour}",
        ]
    )
    state = rng.choice(
        [
            f"{which} should be {colour}",
            f"{which} must be {colour}",
            f"i want {which} to be {colour}",
            f"i want {which} in {colour}",
            f"{which} in {colour}",
            f"{_a(colour)} {shape} instead of the {was} one",
            f"{colour} instead of {was}",
        ]
    )
    return _wished(rng, imperative, state)


# ---------------------------------------------------------------- several images, masks


def _say_subject(rng: random.Random, task: Task) -> str:
    moved, *others = task.target.things
    kind = rng.choice(["object", "shape", "thing"])
    taken = f"the {kind} {rng.choice(['in', 'from', 'of'])} {_TAGS[0]}"
    parts = [f"{taken} {_place(rng, moved.place)}"]
    parts += [f"{_noun(rng, one).rstrip(',')} {_place(rng, one.place)}" for one in others]
    if rng.random() < 0.3:
        parts.reverse()
    verb = rng.choice(["", "draw ", "put ", "show ", "place ", "take "])
    text = f"{verb}{' and '.join(parts)}"
    return _polite(rng, text + _ground_tail(rng, task.target.background))


def _say_compose(rng: random.Random, task: Task) -> str:
    one, two, _ = _TAGS
    kind = rng.choice(["object", "shape", "thing"])
    verb = rng.choice(["put ", "place ", "draw ", "show ", "move "])
    taken = f"the {kind} {rng.choice(['from', 'of', 'in'])} {one}"
    ground = f"the background {rng.choice(['from', 'of', 'in'])} {two}"
    return _polite(rng, f"{verb}{taken} {rng.choice(['on', 'onto', 'in front of'])} {ground}")


def _say_mask(rng: random.Random, task: Task) -> str:
    (scene,), (shown,) = task.inputs, task.target.things
    (thing,) = [one for one in scene.things if one.place == shown.place]
    which = _which(rng, thing, scene)
    return rng.choice(
        [
            f"{_TAGS[0]} segment {which}",
            f"{_TAGS[0]} show a mask of {which}",
            f"in {_TAGS[0]} segment {which}",
            f"a mask of {which} in {_TAGS[0]}",
            f"mask of {which} from {_TAGS[0]}",
            f"please segment {which} in {_TAGS[0]}",
        ]
    )


_OTHERS: dict[str, Callable[[random.Random, Task], str]] = {
    "subject": _say_subject,
    "compose": _say_compose,
    "mask": _say_mask,
}
