"""How people ask the model that ships: the sentences of its training, and those it is scored on."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from examples.shapes import checker, phrases, scenes, tasks, train, wordings, words
from examples.shapes.pool import Pool, make_families
from examples.shapes.scenes import Scene, Thing
from examples.shapes.tasks import Stated

PLACE_WORDS = {"top", "bottom", "upper", "lower", "left", "right", "below", "over"}
DRAWN = 400  # sentences of each kind
_SHAPE_WORDS = {word: shape for shape, some in phrases.SHAPES.items() for word in some}
_SIZE_WORDS = {word: size for size, some in phrases.SIZES.items() for word in some}
_COLOUR_WORDS = {**{colour: colour for colour in scenes.COLOURS}, "violet": "purple"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    words.write_tokenizer(path)
    return Tokenizer.from_file(str(path))


def _drawn(kind: str, count: int = DRAWN) -> list[tuple[tasks.Task, str]]:
    rng = random.Random(kind)
    some = [tasks.random_task(kind, rng) for _ in range(count)]
    return [(task, phrases.free_words(task, rng)) for task in some]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", re.sub(r"<[^>]*>", " ", text.lower())))


@pytest.mark.parametrize("kind", phrases.SHARE)
def test_sentences_name_nothing_that_is_not_there(kind):
    for task, text in _drawn(kind):
        seen = [thing for scene in (*task.inputs, task.target) for thing in scene.things]
        said = _words(text)
        assert {_SHAPE_WORDS[w] for w in said & _SHAPE_WORDS.keys()} <= {t.shape for t in seen}
        assert {_SIZE_WORDS[w] for w in said & _SIZE_WORDS.keys()} <= {t.size for t in seen}
        colours = {_COLOUR_WORDS[word] for word in said & _COLOUR_WORDS.keys()}
        assert colours <= {thing.colour for thing in seen}, text
        grounds = {scene.background for scene in (*task.inputs, task.target)}
        assert said & {"white", "gray", "black", "striped", "checkered"} <= grounds, text


def test_sentences_leave_out_what_people_leave_out():
    """Colour, size and place are missing at times."""
    found = _drawn("text", 2000)
    for said in (
        set(_COLOUR_WORDS),
        PLACE_WORDS,
        {word for some in phrases.SIZES.values() for word in some},
    ):
        share = sum(bool(_words(text) & said) for _, text in found) / len(found)
        assert 0.4 < share < 0.97, (share, said)
    orders = {wordings.skeleton(text) for _, text in found}
    assert len(orders) > 0.8 * len(found)


def test_a_place_that_is_left_out_is_the_first_free_one():
    pool, rng, found = Pool(make_families(200, random.Random(0))), random.Random(1), {1: 0, 2: 0}
    for _ in range(2000):
        task = pool.task("text", rng, implied=0.5)
        text = phrases.free_words(task, rng)
        places = sorted(thing.place for thing in task.target.things)
        if not _words(text) & PLACE_WORDS:
            assert places == [*range(len(places))] or "above" in text or "under" in text, text
            found[len(places)] += 1
    assert min(found.values()) > 100
    # an addition: the first that the picture has free
    for task, text in _drawn("add", 1000):
        (new,) = set(task.target.things) - set(task.inputs[0].things)
        if not _words(text) & PLACE_WORDS:
            assert new.place == int(task.inputs[0].things[0].place == 0), text


def test_places_of():
    assert tasks.places_of([("", 3)]) == [0]
    assert tasks.places_of([("", 3), ("", 0)]) == [0, 1]
    assert tasks.places_of([("", 3), ("both", 0)]) == [1, 0]
    assert tasks.places_of([("row", 3), ("column", 3)]) == [2, 1]
    assert tasks.places_of([("both", 1), ("column", 3)]) == [1, 3]
    assert tasks.places_of([("both", 2), ("both", 3), ("row", 2)])[2] == 2  # none is free


def test_sentences_edit_as_their_tasks_do():
    """They name the new background, the new colour, the new shape."""
    for task, text in _drawn("background"):
        new = task.target.background
        known = {new, *phrases._GROUND_ADJECTIVES.get(new, ())}
        known |= {noun.split()[-1] for noun in phrases._GROUND_NOUNS.get(new, ())}
        assert _words(text) & known, text
    for task, text in _drawn("recolour"):
        (new,) = set(task.target.things) - set(task.inputs[0].things)
        assert new.colour in {_COLOUR_WORDS.get(word) for word in _words(text)}, text
    for task, text in _drawn("add"):
        (new,) = set(task.target.things) - set(task.inputs[0].things)
        assert new.shape in {_SHAPE_WORDS.get(word) for word in _words(text)} or "round" in text


def test_every_word_of_the_sentences_is_a_token(tokenizer):
    unknown = tokenizer.token_to_id("<unk>")
    for kind in phrases.SHARE:
        for _, text in _drawn(kind):
            assert unknown not in tokenizer.encode(text, add_special_tokens=False).ids, text


def test_some_sentences_have_words_that_nobody_knows(tokenizer):
    """So that a model bears them; never in place of an attribute."""
    unknown, rng, found = tokenizer.token_to_id("<unk>"), random.Random(0), 0
    task = tasks.text_task(Scene((Thing("star", "red", "large", 0),), "black"))
    for _ in range(DRAWN):
        before = "Please draw a large red star at the top left on a black background"
        after = phrases._with_unknown(rng, before)
        found += unknown in tokenizer.encode(after, add_special_tokens=False).ids
        lost = _words(before) - _words(after)
        assert not lost & {"large", "red", "star", "top", "left", "black", "background"}
    assert found == DRAWN
    mixed = [phrases.words(task, rng) for _ in range(DRAWN)]
    assert 0.05 < sum(phrases._UNKNOWN in text for text in mixed) / DRAWN < 0.3


def test_no_wording_is_made_in_training():
    """Nor one that differs from it by its attributes alone."""
    rng, made = random.Random(7), set()
    for kind in ("text", *tasks.EDITS):
        for _ in range(6000):
            made.add(wordings.skeleton(phrases.words(tasks.random_task(kind, rng), rng)))
    assert wordings.skeleton("A red star!") in made  # the test can fail
    assert len({wordings.skeleton(one.prompt) for one in wordings.ALL}) == len(wordings.ALL) == 60
    for one in wordings.ALL:
        assert wordings.skeleton(one.prompt) not in made, one.prompt


def test_wordings_state_what_they_are_scored_by():
    for one in wordings.ALL:
        said = _words(one.prompt)
        for thing, stated in zip(one.target.things, one.stated):
            if one.before is None:
                named = {_SHAPE_WORDS.get(word) for word in said}
                assert thing.shape in named, one.prompt
                colours = {_COLOUR_WORDS.get(word) for word in said}
                assert not stated.colour or thing.colour in colours, one.prompt
                sizes = {_SIZE_WORDS.get(word) for word in said}
                assert not stated.size or thing.size in sizes, one.prompt
        if one.before is not None:
            assert one.target != one.before, one.prompt
        drawn = checker.read(scenes.render(one.target))
        score = checker.score(
            drawn, one.target, stated=one.stated, background=one.background_stated
        )
        assert score.all_right, one.prompt


def test_what_is_not_stated_is_not_scored():
    asked = Scene((Thing("star", "red", "large", 0),), "black")
    for stated, changed in (
        (Stated(size=False), {"size": "small"}),
        (Stated(colour=False), {"colour": "blue"}),
        (Stated(place=""), {"place": 3}),
        (Stated(place="row"), {"place": 1}),
        (Stated(place="column"), {"place": 2}),
    ):
        drawn = replace(asked, things=(replace(asked.things[0], **changed),))
        reading = checker.read(scenes.render(drawn))
        assert checker.score(reading, asked, stated=[stated]).all_right
        full = checker.score(reading, asked)
        assert (full.right, full.asked) == (5, 6)
    # a row that is stated counts
    drawn = replace(asked, things=(replace(asked.things[0], place=2),))
    found = checker.score(checker.read(scenes.render(drawn)), asked, stated=[Stated(place="row")])
    assert (found.right, found.asked) == (5, 6)
    white = checker.read(scenes.render(replace(asked, background="white")))
    assert not checker.score(white, asked).all_right
    assert checker.score(white, asked, background=False).all_right


def test_further_training_starts_from_what_is_known(tmp_path, tokenizer):
    """Every weight; a new word begins near the one that means the same."""
    config = train.phi3_config(tokenizer.get_vocab_size(), 64, 1)
    old = tokenizer.get_vocab()
    kept = [word for word in old if word not in ("tiny", "backdrop", "xyz")]
    first = train.make_network(config | {"vocab_size": len(kept)}, 1)
    train.save_model(tmp_path, config, first.named())
    from tokenizers import models

    model = models.WordLevel({word: i for i, word in enumerate(kept)}, unk_token="<unk>")
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer.save(str(tmp_path / "new.json"))
    network = train.make_network(config, 2)
    train.start_from(network, tmp_path, tmp_path / "new.json")
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(network.weight("output.weight"), saved["final_layer.linear.weight"].float())
    table, before = network.weight("embed_tokens"), saved["llm.embed_tokens.weight"].float()
    assert torch.equal(table[old["star"]], before[kept.index("star")])
    for new, known in (("tiny", "small"), ("backdrop", "background")):
        apart = (table[old[new]] - before[kept.index(known)]).norm() / before[0].norm()
        assert 0 < apart < 0.5, new
