"""Promises about numerical trouble: noticed within its round, undone a few times, then a clear end."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import TINY, changed, digits_teacher, small_student, tiny_engine
from torch import Tensor, nn

from ssdkd.coefficients import Coefficients
from ssdkd.distiller import Distiller
from ssdkd.engine import Engine
from ssdkd.errors import NumericalError
from ssdkd.run import distill, main
from ssdkd.trouble import (
    HEALED_AFTER,
    LOWER_RATE,
    MOST_TRIES,
    PATIENCE,
    Guard,
    all_finite,
    copied,
    repaired,
    trouble_in,
)

LONG = changed(rounds=12, inversion={"start": "generator"})


def play(engine: Engine, rounds: int | None = None) -> list[dict[str, float]]:
    """Statistics of the start and of every round."""
    loop = engine.loop()
    seen = [dict(next(loop))]
    while not engine.finished and (rounds is None or len(seen) <= rounds):
        seen.append(dict(loop.send(Coefficients())))
    return seen


def spoil_student(monkeypatch: pytest.MonkeyPatch, *rounds: int) -> list[float]:
    """Put NaN into the student after the replay of these rounds (counted from 1): -> the learning rates used."""
    replay, rates = Distiller.replay, []

    def spoiled(self: Distiller, buffer: Any, rows: Tensor, weights: Tensor, rate: float, show: Any) -> Any:
        rates.append(rate)
        replayed = replay(self, buffer, rows, weights, rate, show)
        if len(rates) in rounds:
            with torch.no_grad():
                next(self.student.parameters()).view(-1)[0] = math.nan
                buffer.delta[0] = math.nan
        return replayed

    monkeypatch.setattr(Distiller, "replay", spoiled)
    return rates


class NanWhere(nn.Module):
    """A teacher that answers NaN for the images that `chosen` names."""

    def __init__(self, chosen: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.teacher, self.chosen = digits_teacher(), chosen

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.teacher(images)
        return answer.masked_fill(self.chosen(images)[:, None], math.nan)


def test_what_holds_no_numbers_is_finite_on_the_device_that_is_asked_for() -> None:
    somewhere = torch.device("meta")  # stands for a GPU, whose numbers do not mix with those of the CPU
    assert all_finite({"remembered": None}, somewhere).device == somewhere


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_one_number_that_is_not_finite_is_found_among_many_at_any_depth(broken: float) -> None:
    sound = {"lists": [torch.ones(2), (torch.zeros(3), None)], "none": torch.empty(0), "steps": torch.arange(3), "n": 1}
    assert float(all_finite(sound, torch.device("cpu"))) == 1.0
    assert float(all_finite({**sound, "deep": {"er": (torch.tensor([1.0, broken, 2.0]),)}}, torch.device("cpu"))) == 0.0


def test_a_copied_state_is_of_the_same_shape_and_follows_no_later_change() -> None:
    state = {"weights": torch.ones(2, requires_grad=True), "each": [(torch.ones(1), None)], "step": 3}
    held = copied(state)
    with torch.no_grad():
        state["weights"].zero_()  # type: ignore[attr-defined]
        state["each"][0][0].zero_()  # type: ignore[index]
    assert held["weights"].tolist() == [1.0, 1.0]
    assert not held["weights"].requires_grad
    assert isinstance(held["each"][0], tuple)
    assert (held["each"][0][0].item(), held["each"][0][1], held["step"]) == (1.0, None, 3)


SOUND = {
    **{"replay_loss": 1.0, "probe_kl": 1.0, "student_finite": 1.0, "generator_finite": 1.0, "term_loss": 2.0},
    **{"candidates": 64.0, "candidates_broken": 0.0, "inverted": 32.0},
    **{"candidate_pixel_spread": 30.0, "candidate_classes": 10.0, "target_share_max": 0.1},
}
OF_GENERATOR, OF_PIXELS = "lower inversion.generator_rate and inversion.meta_rate", "lower inversion.pixel_rate"
ASIDE = "; the teacher's answer is not finite for 5 of 64 candidates"
ALL_BROKEN = "no candidate was usable; the teacher's answer is not finite for 64 of 64 candidates"


@pytest.mark.parametrize("start", ["generator", "pyramid"])
@pytest.mark.parametrize(
    ("facts", "part", "what", "advice"),
    [
        ({"replay_loss": math.nan}, "student", "replay_loss is nan", LOWER_RATE),
        ({"probe_kl": math.inf}, "student", "probe_kl is inf", LOWER_RATE),
        ({"student_finite": 0.0}, "student", "the student's weights are not finite", LOWER_RATE),
        ({"term_loss": math.inf}, "generator", "the inversion loss is inf", None),
        ({"term_loss": math.nan, "candidates_broken": 5.0}, "generator", f"the inversion loss is nan{ASIDE}", None),
        ({"generator_finite": 0.0}, "generator", "the generator's weights are not finite", None),
        ({"generator_finite": 0.0, "candidates_broken": 5.0}, "generator", f"weights are not finite{ASIDE}", None),
        ({"candidates_broken": 64.0}, "generator", ALL_BROKEN, "look at the teacher and its input range"),
        ({"candidate_pixel_spread": 0.4}, "generator", "collapsed: every candidate is the same image", None),
        (
            {"candidate_classes": 1.0, "target_share_max": 0.7},
            "generator",
            "candidate is of one class",
            "terms.balance",
        ),
    ],
)
def test_what_is_wrong_is_told_of_its_part_with_what_helps(
    facts: dict[str, float], part: str, what: str, advice: str | None, start: str
) -> None:
    (found,) = trouble_in(SOUND | facts, SOUND, start)
    assert found.part == part
    assert found.what.endswith(what)
    assert (advice or {"generator": OF_GENERATOR, "pyramid": OF_PIXELS}[start]) in found.advice


@pytest.mark.parametrize(
    ("now", "before"),
    [
        ({}, {}),
        ({"candidates_broken": 5.0}, {}),  # the others serve
        ({"candidate_pixel_spread": 0.5}, {}),
        ({"candidate_pixel_spread": 0.1}, {"candidate_pixel_spread": 0.4}),  # they have always been alike
        ({"candidate_pixel_spread": 0.1, "inverted": 15.0}, {}),  # too few to tell
        ({"candidate_classes": 1.0}, {"candidate_classes": 1.0}),
        ({"candidate_classes": 1.0, "target_share_max": 0.75}, {}),  # hardly another class was asked for
        ({"candidate_classes": 2.0}, {}),
        ({"candidates": 0.0, "inverted": 0.0}, {}),
    ],
)
def test_what_is_no_trouble(now: dict[str, float], before: dict[str, float]) -> None:
    assert trouble_in(SOUND | now, SOUND | before) == []


def test_nothing_has_collapsed_where_nothing_came_before_and_no_loss_is_no_trouble() -> None:
    now = SOUND | {"candidate_pixel_spread": 0.1, "candidate_classes": 1.0}
    del now["term_loss"]  # as in a round of textures alone
    assert trouble_in(now, {}) == []


@pytest.mark.parametrize("part", ["student", "generator"])
def test_what_is_reported_after_going_back_is_of_where_it_went_back_to(part: str) -> None:
    good = SOUND | {"replay_agreement": 0.9, "probe_agreement": 0.8}
    bad = {"probe_kl": 7.0, "probe_agreement": 0.1, "candidate_pixel_spread": 0.1, "candidate_classes": 1.0}
    now = good | bad | {"replay_loss": math.nan, "term_loss": math.inf, "term_new": math.nan, "round": 3.0}
    reported, judged_by = repaired(now, good, {part})
    of_student = good if part == "student" else now
    assert (reported["probe_kl"], reported["probe_agreement"]) == (
        of_student["probe_kl"],
        of_student["probe_agreement"],
    )
    assert (reported["replay_loss"], reported["term_loss"], reported["term_new"]) == (1.0, 2.0, 0.0), "no NaN is told"
    assert (reported["candidate_pixel_spread"], reported["round"]) == (0.1, 3.0), "but else what happened"
    assert judged_by == reported | {"candidate_pixel_spread": 30.0, "candidate_classes": 10.0}


# -- the student ------------------------------------------------------------------------------------------


def test_a_student_that_leaves_the_finite_numbers_goes_back_to_the_round_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = changed(rounds=8, distillation={"schedule": "constant"}, inversion={"start": "generator"})
    rates = spoil_student(monkeypatch, 3)
    engine = tiny_engine(options)
    loop = engine.loop()
    next(loop)
    for _ in range(2):
        loop.send(Coefficients())
    before = copy.deepcopy(engine.student.state_dict())
    generator = copy.deepcopy(engine.inverter.state_dict()["base"])
    third = loop.send(Coefficients())
    assert third["rollbacks"] == 1
    went_on = engine.inverter.state_dict()["base"]
    held = engine.guard.good["generator"]["base"]
    assert all(torch.equal(value, held[name]) for name, value in went_on.items()), "what did well is held as it is now"
    assert third["student_finite"] == 0, "what happened is told"
    assert all(math.isfinite(value) for value in third.values()), "and what is computed from goes on being numbers"
    assert all(torch.equal(value, before[name]) for name, value in engine.student.state_dict().items())
    assert torch.isfinite(engine.buffer.delta).all()
    assert not all(torch.equal(v, generator[n]) for n, v in engine.inverter.state_dict()["base"].items())
    loop.send(Coefficients())
    assert rates[3] == rates[2] / 2, "half the step from now on"
    assert float(all_finite(engine.student.state_dict(), engine.device)) == 1.0


def test_trouble_that_comes_back_ends_the_run_after_a_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_student(monkeypatch, *range(3, 100))
    engine = tiny_engine(LONG)
    with pytest.raises(NumericalError, match=r"training diverged; lower distillation\.learning_rate") as caught:
        play(engine)
    assert caught.value.exit_code == 3
    assert engine.guard.rollbacks == MOST_TRIES + 1
    assert engine.round == 2 + MOST_TRIES + 1
    assert float(all_finite(engine.student.state_dict(), engine.device)) == 1.0, "what was learned so far is there"


def test_a_round_in_trouble_does_not_count_for_ever() -> None:
    guard = Guard()
    for _ in range(20):
        assert guard.note_trouble({"student"})
        for _ in range(100):
            guard.note_good_round()
    assert guard.rollbacks == 20


def test_trouble_in_the_first_round_goes_back_to_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_student(monkeypatch, 1)
    engine = tiny_engine(LONG)
    begun = copy.deepcopy(engine.student.state_dict())
    seen = play(engine, rounds=1)
    assert seen[1]["rollbacks"] == 1
    assert all(torch.equal(value, begun[name]) for name, value in engine.student.state_dict().items())
    assert seen[1]["probe_kl"] == seen[0]["probe_kl"]


def test_tries_count_anew_after_a_hundred_good_rounds_and_no_sooner() -> None:
    guard = Guard()
    assert [guard.note_trouble({"student"}) for _ in range(MOST_TRIES)] == [True] * MOST_TRIES
    for _ in range(HEALED_AFTER - 1):
        guard.note_good_round()
    assert not guard.note_trouble({"student"}), "one good round too few"
    for _ in range(HEALED_AFTER):
        guard.note_good_round()
    assert guard.note_trouble({"generator"})
    assert (HEALED_AFTER, MOST_TRIES) == (100, 3)
    assert guard.step == {"student": 0.5 ** (MOST_TRIES + 1), "generator": 0.5}, "steps stay as small as they are"


def test_a_run_with_a_rollback_resumes_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_student(monkeypatch, 3, 5)
    whole = tiny_engine(LONG)
    loop = whole.loop()
    next(loop)
    for _ in range(4):
        loop.send(Coefficients())
    saved = copy.deepcopy(whole.state_dict())
    while not whole.finished:
        last = loop.send(Coefficients())
    assert last["rollbacks"] == 2

    monkeypatch.undo()
    spoil_student(monkeypatch, 1)
    resumed = tiny_engine(LONG)
    resumed.load_state_dict(saved)
    again = play(resumed)[-1]
    untimed = [{k: v for k, v in facts.items() if k != "seconds"} for facts in (last, again)]
    assert untimed[0] == untimed[1]
    for one, other in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(one, other)


# -- the generator ----------------------------------------------------------------------------------------


def test_a_collapsed_generator_goes_back_and_takes_smaller_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(LONG)
    loop = engine.loop()
    next(loop)
    loop.send(Coefficients())
    base = copy.deepcopy(engine.inverter.state_dict()["base"])
    invert = engine.inverter.invert

    def collapsed(*arguments: Any) -> Any:
        images, values = invert(*arguments)
        return images[:1].expand_as(images).contiguous(), values

    monkeypatch.setattr(engine.inverter, "invert", collapsed)
    statistics = loop.send(Coefficients())
    assert statistics["rollbacks"] == 1
    assert statistics["candidate_pixel_spread"] == 0.0
    assert all(torch.equal(v, base[n]) for n, v in engine.inverter.state_dict()["base"].items())
    assert engine.inverter.pace == 0.5
    assert engine.guard.step["student"] == 1.0, "only the part in trouble"
    monkeypatch.undo()
    assert loop.send(Coefficients())["rollbacks"] == 1

    monkeypatch.setattr(engine.inverter, "invert", collapsed)
    with pytest.raises(NumericalError, match="generator collapsed: every candidate is the same image"):
        _ = [loop.send(Coefficients()) for _ in range(10)]


def test_candidates_of_one_class_where_many_were_asked_for_are_a_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(LONG)
    loop = engine.loop()
    assert next(loop)["candidate_classes"] > 1
    label = engine._label

    def of_one_class(images: Tensor) -> Any:
        samples = label(images)
        samples.classes.fill_(3)
        return samples

    monkeypatch.setattr(engine, "_label", of_one_class)
    assert loop.send(Coefficients())["rollbacks"] == 1


def test_a_generator_with_nan_in_it_goes_back() -> None:
    engine = tiny_engine(LONG)
    loop = engine.loop()
    next(loop)
    with torch.no_grad():
        next(engine.inverter.base.parameters()).view(-1)[0] = math.nan  # type: ignore[attr-defined]
    statistics = loop.send(Coefficients())
    assert statistics["generator_finite"] == 0
    assert statistics["rollbacks"] == 1
    assert loop.send(Coefficients())["generator_finite"] == 1


# -- the teacher ------------------------------------------------------------------------------------------


def one_in(many: int) -> Callable[[Tensor], Tensor]:
    """About one image in so many, for no reason that a search could find."""
    return lambda images: (images.double().abs().sum(dim=(1, 2, 3)) * 1e4).long() % many == 0


def test_images_that_the_teacher_answers_with_nan_never_enter_the_buffer() -> None:
    engine = tiny_engine(LONG, teacher=NanWhere(one_in(400)))
    seen = play(engine)
    assert sum(facts["candidates_broken"] for facts in seen) > 0, "the teacher did misbehave"
    assert torch.isfinite(engine.buffer.filled().logits).all()
    assert torch.isfinite(engine.buffer.delta).all()
    assert torch.isfinite(engine.probe_logits).all()
    assert all(math.isfinite(value) for name, value in seen[-1].items() if not name.startswith("term_"))
    assert seen[-1]["probe_kl"] < seen[0]["probe_kl"], "and the student learns all the same"


def test_a_teacher_that_often_answers_nan_is_named_as_the_cause() -> None:
    engine = tiny_engine(LONG, teacher=NanWhere(one_in(5)))
    with pytest.raises(NumericalError, match=r"the teacher's answer is not finite for \d+ of 32 candidates"):
        play(engine)
    assert torch.isfinite(engine.buffer.filled().logits).all()
    assert float(all_finite(engine.student.state_dict(), engine.device)) == 1.0


def test_a_teacher_of_nothing_but_nan_is_one_sentence() -> None:
    engine = tiny_engine(teacher=NanWhere(lambda images: torch.ones(len(images), dtype=torch.bool)))
    with pytest.raises(NumericalError, match=r"not finite for any of the first images: .* image\.mean"):
        next(engine.loop())


class NanFrom(nn.Module):
    """A teacher that answers NaN from some call on, for so many calls."""

    def __init__(self, first: int, calls: int) -> None:
        super().__init__()
        self.teacher, self.first, self.last, self.labelled = digits_teacher(), first, first + calls, 0

    def broken(self, answers: Tensor) -> bool:
        self.labelled += not answers.requires_grad  # the search asks with a gradient, labelling without
        return self.first <= self.labelled < self.last and not answers.requires_grad

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.teacher(images)
        return answers * math.nan if self.broken(answers) else answers


FRESH = changed(rounds=12, buffer={"fresh": True})


def test_a_buffer_that_begins_anew_each_round_bears_a_round_without_usable_candidates() -> None:
    engine = tiny_engine(FRESH, teacher=NanFrom(first=10, calls=1))
    seen = play(engine)
    broken = [facts for facts in seen if facts["candidates_broken"]]
    assert [facts["candidates_broken"] for facts in broken] == [32]
    assert seen[-1]["rollbacks"] == 1
    assert all(facts["buffer_size"] > 0 for facts in seen), "the images of the round before served again"
    assert engine.finished


def test_a_teacher_that_never_answers_again_ends_the_run_after_a_few_tries() -> None:
    engine = tiny_engine(FRESH, teacher=NanFrom(first=10, calls=10**6))
    with pytest.raises(NumericalError, match=r"no candidate was usable.*again after 3 times.*look at the teacher"):
        play(engine)
    assert engine.guard.rollbacks == MOST_TRIES + 1
    assert torch.isfinite(engine.buffer.filled().logits).all()


def test_a_run_may_begin_without_a_usable_image() -> None:
    nothing_kept = changed(rounds=12, buffer={"fresh": True}, inversion={"warmup_kept": 0.0})
    engine = tiny_engine(nothing_kept, teacher=NanFrom(first=5, calls=2))
    seen = play(engine)
    assert [facts["buffer_size"] for facts in seen[:3]] == [0, 0, 0]
    assert (seen[1]["student_steps"], seen[3]["student_steps"]) == (0, 4)
    assert seen[-1]["probe_kl"] < seen[0]["probe_kl"]


# -- slow divergence --------------------------------------------------------------------------------------


def facts(kl: float, loss: float) -> dict[str, float]:
    return {"probe_kl": kl, "probe_agreement": 0.5, "replay_loss": loss, "replay_agreement": 0.5}


def strays(guard: Guard, kls: list[float], losses: list[float]) -> list[int]:
    """Feed a guard rounds: -> those in which it found that the student had strayed."""
    found = []
    for number, (kl, loss) in enumerate(zip(kls, losses, strict=True)):
        now = facts(kl, loss)
        if guard.strayed(now):
            found.append(number)
        else:
            guard.hold({"student": {"network": {}}}, now)
    return found


def test_a_student_far_from_its_best_for_long_has_strayed() -> None:
    learning = [2.0, 1.0, 0.5, 0.4]
    assert strays(Guard(), learning + [2.0] * 25, learning + [2.0] * 25) == [len(learning) + PATIENCE - 1]


@pytest.mark.parametrize(
    ("kls", "losses"),
    [
        ([2.0, 9.0, 30.0, 9.0, *[4.0] * 10, *[1.0] * 30], [2.0, 40.0, 90.0, *[9.0] * 11, *[1.0] * 30]),  # the start
        ([2.0, 1.0, 0.4, *[0.5] * 50], [2.0, 1.0, 0.2, *[5.0] * 50]),  # harder images are replayed
        ([2.0, 1.0, 0.4, *[2.0] * 50], [2.0, 1.0, 0.5, *[0.7] * 50]),  # the probe alone
        ([2.0, 1.0, 0.01, *[0.1] * 50], [2.0, 1.0, 0.01, *[0.1] * 50]),  # hardly anything to lose
        ([1.0, 0.3, *[2.0, 2.0, 0.5] * 20], [1.0, 0.3, *[2.0, 2.0, 0.5] * 20]),  # it comes back by itself
        ([math.log(10.0)] + [3.0] * 60, [0.0] + [3.0] * 60),  # nothing was ever learned
    ],
)
def test_what_is_no_divergence(kls: list[float], losses: list[float]) -> None:
    assert strays(Guard(), kls, losses) == []


def unlearn(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Let the learning rate explode in these rounds, which leaves finite weights that know nothing."""
    replay, count = Distiller.replay, [0]

    def spoiled(self: Distiller, buffer: Any, rows: Tensor, weights: Tensor, rate: float, show: Any) -> Any:
        count[0] += 1
        spoil = first <= count[0] <= last
        return replay(self, buffer, rows, weights, 300.0 * rate if spoil else rate, show)

    monkeypatch.setattr(Distiller, "replay", spoiled)


CLIPPED = changed(rounds=24, distillation={"clip": 1.0, "schedule": "constant"})


def test_a_student_that_unlearns_goes_back_to_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdkd.trouble.PATIENCE", 4)
    unlearn(monkeypatch, 10, 13)
    engine = tiny_engine(CLIPPED)
    seen = play(engine)
    kls = [facts["probe_kl"] for facts in seen]
    best = min(kls[1:10])
    assert all(math.isfinite(kl) and kl > 3 * best for kl in kls[10:13]), "it was bad, but finite"
    assert [facts["rollbacks"] for facts in seen] == [0] * 13 + [1] * 12
    assert kls[13] == best
    assert engine.guard.step["student"] == 0.5
    assert kls[-1] < 1.5 * best


def test_the_best_student_stays_what_it_was_while_another_goes_on_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdkd.trouble.PATIENCE", 2)
    unlearn(monkeypatch, 4, 5)
    engine = tiny_engine(CLIPPED)
    loop = engine.loop()
    next(loop)
    while not engine.guard.rollbacks:
        loop.send(Coefficients())
    best = engine.guard.best["student"]
    held = copy.deepcopy(best)
    loop.send(Coefficients())
    assert all(torch.equal(value, held["network"][name]) for name, value in best["network"].items())
    for slot, state in best["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, held["optimizer"]["state"][slot][name]), "its momentum too"
    assert best["optimizer"]["state"]


def test_a_run_that_strayed_resumes_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdkd.trouble.PATIENCE", 4)
    unlearn(monkeypatch, 10, 13)
    whole = tiny_engine(CLIPPED)
    loop = whole.loop()
    next(loop)
    for _ in range(11):
        loop.send(Coefficients())
    saved = copy.deepcopy(whole.state_dict())
    while not whole.finished:
        loop.send(Coefficients())
    assert whole.guard.rollbacks == 1
    monkeypatch.undo()
    monkeypatch.setattr("ssdkd.trouble.PATIENCE", 4)
    unlearn(monkeypatch, 1, 2)
    resumed = tiny_engine(CLIPPED)
    resumed.load_state_dict(saved)
    play(resumed)
    assert resumed.guard.rollbacks == 1
    for one, other in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_student_that_unlearns_again_and_again_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdkd.trouble.PATIENCE", 2)
    unlearn(monkeypatch, 10, 100)
    with pytest.raises(NumericalError, match=r"probe_kl has been above 3 times its best.*again after 3 times"):
        play(tiny_engine(CLIPPED))


# -- the command ------------------------------------------------------------------------------------------


def test_the_command_ends_with_3_says_what_to_do_and_leaves_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_student(monkeypatch, *range(5, 100))
    argv = ["--rounds", "20", "--inversion.images", "32", "--inversion.steps", "2", "--inversion.warmup", "2"]
    argv += ["--distillation.steps", "3", "--checkpoint.rounds", "1", "--tracking.report", "off"]
    assert main([*argv, "--out", str(tmp_path)]) == 3
    (folder,) = tmp_path.iterdir()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert f"its student so far is in {folder / 'student.so-far.safetensors'}" in said
    assert "saved as of round 7" in said
    assert "--resume" in said
    assert (folder / "student.so-far.safetensors").is_file()
    assert not (folder / "student.safetensors").exists(), "that name is for a run that ended well"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["rollbacks"] for line in lines] == [0, 0, 0, 0, 1, 2, 3]


def test_the_library_gives_the_last_good_student_back(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_student(monkeypatch, *range(3, 100))
    student = small_student()
    options = {k: v for k, v in TINY.items() if k != "rounds"}
    with pytest.raises(NumericalError, match="nothing was saved"):
        distill(digits_teacher(), student, dataset="digits", rounds=12, **options)
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_the_summary_counts_rollbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_student(monkeypatch, 2)
    options = {k: v for k, v in TINY.items() if k != "rounds"}
    result = distill(digits_teacher(), small_student(), dataset="digits", rounds=6, **options)
    assert result.summary["rollbacks"] == 1
