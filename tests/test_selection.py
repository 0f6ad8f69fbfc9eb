"""Laws of selection: what is kept follows phi, what is replayed follows pi, and the weights undo the bias."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssdkd import selection


def random_from(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def skewed(n: int, seed: int) -> torch.Tensor:
    """Probabilities (n,) that span three orders of magnitude."""
    return torch.softmax(torch.randn(n, generator=random_from(seed)).double() * 1.5, dim=0)


def replayed(log_pi: torch.Tensor) -> torch.Tensor:
    """P of what has these log priorities: (N,)."""
    return selection.replay_probabilities(selection.priorities(log_pi))


# -- drawing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_draws_follow_the_probabilities(seed: int) -> None:
    p = skewed(25, seed)
    drawn = torch.bincount(selection.draw(p, 20_000, random_from(seed)), minlength=25)
    assert stats.chisquare(drawn.numpy(), (20_000 * p).numpy()).pvalue > 1e-4


def test_every_place_in_the_drawn_order_follows_the_probabilities() -> None:
    """A stratified draw comes out sorted; were it not shuffled, each batch would hold neighbours."""
    p, generator = skewed(6, 0), random_from(1)
    rounds = torch.stack([selection.draw(p, 8, generator) for _ in range(4000)])
    for place in (0, 7):
        seen = torch.bincount(rounds[:, place], minlength=6)
        assert stats.chisquare(seen.numpy(), (4000 * p).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("how_many", [10, 128, 1000])
def test_each_sample_comes_up_within_one_of_its_expected_number(how_many: int) -> None:
    for seed in range(50):
        p = skewed(37, seed)
        drawn = torch.bincount(selection.draw(p, how_many, random_from(seed)), minlength=37)
        assert ((drawn - how_many * p).abs() <= 1.0 + 1e-9).all()


def test_uniform_probabilities_give_whole_epochs() -> None:
    uniform = torch.full((96,), 1 / 96, dtype=torch.float64)
    drawn = torch.bincount(selection.draw(uniform, 3 * 96, random_from(0)), minlength=96)
    assert drawn.min() >= 2
    assert drawn.max() <= 4
    assert drawn.float().var() < 0.1, "coin tosses would vary by 3"


def test_what_has_no_probability_is_never_drawn() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    assert set(selection.draw(p, 999, random_from(0)).tolist()) == {1, 3}


def test_the_same_generator_state_draws_the_same() -> None:
    p = skewed(50, 0)
    first, again, other = (selection.draw(p, 64, random_from(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_shares_smaller_than_single_precision_survive() -> None:
    """Of a million equal samples behind one heavy one, the last must be as likely as the first."""
    log_pi = torch.zeros(1_000_000)
    log_pi[0] = math.log(1e6)
    drawn = selection.draw(selection.priorities(log_pi), 100_000, random_from(0))
    behind = drawn[drawn > 0].float() / 1e6
    assert behind.mean().item() == pytest.approx(0.5, abs=0.01)
    assert len(behind) == pytest.approx(50_000, abs=2)


@pytest.mark.parametrize("n", [64_000, 63_999, 64_001])
def test_a_large_buffer_is_drawn_from_by_blocks_as_if_one_by_one(n: int) -> None:
    how_many, pi = 1000, torch.rand(n, generator=random_from(0)) ** 2
    pi[100:300] = 0.0
    assert n >= selection.BLOCK * how_many, "no blocks would be used"
    p = selection.replay_probabilities(pi)
    counted = torch.zeros(n, dtype=torch.int64)
    for seed in range(40):
        drawn = torch.bincount(selection.draw(pi, how_many, random_from(seed)), minlength=n)
        assert ((drawn - how_many * p).abs() <= 1.0 + 1e-6).all()
        counted += drawn
    assert counted[pi == 0].sum() == 0
    parts = torch.arange(n) * 20 // n
    of_parts = torch.zeros(20, dtype=torch.float64).scatter_add_(0, parts, 40_000 * p)
    seen = torch.zeros(20, dtype=torch.int64).scatter_add_(0, parts, counted)
    assert (seen - of_parts).abs().max() <= 2 * 40, "each part's share is kept at every draw, to within two"
    order = torch.zeros(n, dtype=torch.int64)  # inside blocks: the heavier a sample, the oftener it comes
    order[pi.argsort()] = torch.arange(n) * 5 // n
    by_weight = torch.zeros(5, dtype=torch.int64).scatter_add_(0, order, counted)
    expected = torch.zeros(5, dtype=torch.float64).scatter_add_(0, order, 40_000 * p)
    assert (by_weight - expected).abs().max() < 4 * expected.sqrt().max()


def test_a_heavy_sample_among_a_million_takes_its_share_alone() -> None:
    pi = torch.full((1_000_003,), 1e-6)
    pi[-1] = 1.0
    drawn = selection.draw(pi, 1000, random_from(0))
    assert (drawn == 1_000_002).sum().item() == pytest.approx(500, abs=1)
    assert drawn[drawn < 1_000_002].float().mean().item() == pytest.approx(5e5, rel=0.01)


# -- importance weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_full_importance_weights_undo_the_bias_exactly(seed: int) -> None:
    p = skewed(200, seed)
    f = torch.randn(200, generator=random_from(seed)).double()
    w = selection.importance_weights(p, beta=1.0).double()
    assert ((p * w * f).sum() / (p * w).sum()).item() == pytest.approx(f.mean().item(), abs=1e-5)


def test_weighted_draws_estimate_the_plain_mean_and_unweighted_ones_do_not() -> None:
    p, generator = skewed(50, 2), random_from(9)
    f = p.log()  # high where drawn often: without weights the mean comes out too high
    rows = selection.draw(p, 50_000, generator)
    w = selection.importance_weights(p, beta=1.0).double()[rows]
    assert ((w * f[rows]).sum() / w.sum()).item() == pytest.approx(f.mean().item(), abs=0.02)
    assert f[rows].mean().item() > f.mean().item() + 0.5


@given(st.integers(1, 300), st.floats(0.0, 1.0), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_weights_lie_above_zero_and_reach_one(n: int, beta: float, seed: int) -> None:
    p = torch.softmax(20 * torch.randn(n, generator=random_from(seed)).double(), dim=0)
    w = selection.importance_weights(p, beta)
    assert (w > 0).all()
    assert w.max().item() == pytest.approx(1.0)


def test_neither_drawing_nor_weighing_asks_that_the_priorities_sum_to_one() -> None:
    p = skewed(40, 3)
    assert torch.equal(selection.draw(8.0 * p, 100, random_from(0)), selection.draw(p, 100, random_from(0)))
    torch.testing.assert_close(selection.importance_weights(8.0 * p, 0.7), selection.importance_weights(p, 0.7))


def test_how_unequal_the_draws_are_is_told_in_shares() -> None:
    even, one = torch.full((50,), 3.0), torch.tensor([5.0] + [0.0] * 19)
    assert selection.effective_share(even).item() == pytest.approx(1.0)
    assert selection.effective_share(one).item() == pytest.approx(1 / 20)
    assert selection.top_decile_share(even).item() == pytest.approx(0.1)
    assert selection.top_decile_share(torch.cat([one, one])).item() == pytest.approx(1.0)


def test_weights_fall_with_probability_and_beta_says_how_much() -> None:
    p = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    assert selection.importance_weights(p, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert selection.importance_weights(p, 1.0).tolist() == pytest.approx([1.0, 1 / 2, 1 / 7])
    assert selection.importance_weights(p, 0.5).tolist() == pytest.approx([1.0, 2**-0.5, 7**-0.5])
    drawn = torch.tensor([2, 1, 2])
    assert torch.equal(selection.importance_weights(p, 0.5, drawn), selection.importance_weights(p, 0.5)[drawn])


# -- the two functions ----------------------------------------------------------------------------------


def test_neutral_coefficients_keep_and_replay_uniformly() -> None:
    classes = torch.tensor([0, 0, 0, 1, 2, 2])
    confidence = torch.tensor([0.1, 1.0, 0.5, 0.99, 0.3, 0.0])
    delta = torch.tensor([0.0, 1e-9, 3.0, 100.0, 0.2, 0.7])
    log_phi = selection.log_modulation(classes, confidence, selection.class_counts(classes, 4), 0.0, 0.0)
    p = replayed(selection.log_priority(delta, log_phi, alpha=0.0, eta=0.0))
    assert torch.exp(log_phi).tolist() == pytest.approx([1.0] * 6)
    assert p.tolist() == pytest.approx([1 / 6] * 6)
    assert selection.importance_weights(p, beta=1.0).tolist() == pytest.approx([1.0] * 6)


def test_the_modulating_function_is_the_documented_formula() -> None:
    counts = torch.tensor([6.0, 2.0, 1.0])  # mean 3
    log_phi = selection.log_modulation(
        torch.tensor([0, 1, 2]), torch.tensor([0.5, 0.9, 0.2]), counts, w_div=1.5, gamma=2.0
    )
    expected = [
        -1.5 * math.log(6 / 3) + 2 * math.log(0.5),
        -1.5 * math.log(2 / 3) + 2 * math.log(0.1),
        -1.5 * math.log(1 / 3) + 2 * math.log(0.8),
    ]
    assert log_phi.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("gamma", "preferred"), [(1.0, "hard"), (-1.0, "easy")])
def test_the_sign_of_gamma_chooses_between_hard_and_easy(gamma: float, preferred: str) -> None:
    classes, counts = torch.zeros(2, dtype=torch.int64), torch.tensor([2.0])
    hard, easy = selection.log_modulation(classes, torch.tensor([0.2, 0.95]), counts, 0.0, gamma).tolist()
    assert (hard > easy) == (preferred == "hard")


def test_w_div_prefers_rare_classes_whatever_the_confidence() -> None:
    classes = torch.tensor([0, 1])
    crowded, rare = selection.log_modulation(
        classes, torch.tensor([0.9, 0.9]), torch.tensor([90.0, 10.0]), 1.0, 0.0
    ).tolist()
    assert rare - crowded == pytest.approx(math.log(9))


def test_what_was_replayed_wears_by_the_times_and_what_was_not_does_not() -> None:
    visits = torch.tensor([0, 1, 3, 2**40])
    assert selection.log_worn(visits, 0.0).tolist() == [0.0] * 4
    assert selection.log_worn(visits, 0.5).exp().tolist() == pytest.approx([1.0, 2**-0.5, 0.5, 2**-20], rel=1e-4)


def test_replay_follows_disagreement_with_alpha_and_phi_with_eta() -> None:
    delta, log_phi = torch.tensor([1.0, 4.0]), torch.tensor([0.0, math.log(3.0)])
    by_delta = replayed(selection.log_priority(delta, log_phi, 0.5, 0.0))
    by_both = replayed(selection.log_priority(delta, log_phi, 0.5, 1.0))
    assert (by_delta[1] / by_delta[0]).item() == pytest.approx(2.0, abs=1e-4)
    assert (by_both[1] / by_both[0]).item() == pytest.approx(6.0, abs=1e-4)


def test_the_edges_of_confidence_and_disagreement_stay_finite() -> None:
    classes, confidence = torch.tensor([0, 1, 1]), torch.tensor([1.0, 1.0 + 1e-6, 0.0])
    counts = torch.tensor([0.0, 2.0, 0.0])
    log_phi = selection.log_modulation(classes, confidence, counts, 2.0, 4.0)
    log_pi = selection.log_priority(torch.tensor([0.0, -1e-7, 1e6]), log_phi, 1.5, 1.0)
    p = replayed(log_pi)
    assert torch.isfinite(log_phi).all()
    assert torch.isfinite(p).all()
    assert p.sum().item() == pytest.approx(1.0)


# -- class counts and the next targets ------------------------------------------------------------------


def test_the_highest_priority_is_one_however_high_it_was() -> None:
    assert selection.priorities(torch.tensor([90.0, 100.0, -100.0])).tolist() == [pytest.approx(math.exp(-10)), 1, 0]


def test_class_counts_are_a_recount() -> None:
    classes = torch.randint(0, 7, (300,), generator=random_from(0))
    counted = selection.class_counts(classes, 9)
    assert counted.tolist() == [sum(int(c) == k for c in classes) for k in range(9)]


def test_the_class_prior_favours_rare_classes_by_the_power_w_div() -> None:
    counts = torch.tensor([0.0, 10.0, 100.0, 1000.0])
    flat, steep, steeper = (selection.class_prior(counts, w) for w in (0.0, 1.0, 2.0))
    assert flat.tolist() == pytest.approx([0.25] * 4)
    assert (steep[:-1] > steep[1:]).all()
    assert (steep[1] / steep[3]).item() == pytest.approx(100, rel=0.1)
    assert (steeper[1] / steeper[3]).item() == pytest.approx(100**2, rel=0.2)
    for prior in (flat, steep, steeper):
        assert prior.sum().item() == pytest.approx(1.0)


# -- keeping --------------------------------------------------------------------------------------------


def test_the_noisy_best_is_a_draw_in_proportion_to_phi() -> None:
    phi = torch.tensor([1.0, 2.0, 3.0, 6.0, 0.5])
    noise = selection.gumbel_noise(20_000 * 5, random_from(0)).view(20_000, 5)
    best = torch.bincount((phi.log() + noise).argmax(dim=1), minlength=5)
    assert stats.chisquare(best.numpy(), (20_000 * phi.double() / phi.double().sum()).numpy()).pvalue > 1e-4


def test_the_noisy_best_two_are_a_draw_without_replacement() -> None:
    phi = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64)
    noise = selection.gumbel_noise(24_000 * 4, random_from(1)).view(24_000, 4)
    pairs = (phi.log() + noise).topk(2, dim=1).indices
    seen = torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16)
    expected = torch.zeros(16, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            if i != j:
                expected[4 * i + j] = 24_000 * phi[i] / phi.sum() * phi[j] / (phi.sum() - phi[i])
    possible = expected > 0
    assert seen[~possible].sum() == 0
    assert stats.chisquare(seen[possible].numpy(), expected[possible].numpy()).pvalue > 1e-4


SCORES = st.lists(st.integers(-20, 20).map(float), min_size=1, max_size=30)


def after_exchange(held: torch.Tensor, new: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores that stay, and which slots changed."""
    slots, winners, accepted = selection.exchange(held, new, limit)
    kept = held.clone()
    kept[slots[accepted]] = new[winners[accepted]]
    assert len(set(slots.tolist())) == len(slots), "a slot gave way twice"
    assert len(set(winners.tolist())) == len(winners), "a candidate was taken twice"
    assert (new[winners[accepted]] > held[slots[accepted]]).all(), "a slot gave way to what is no better"
    return kept, slots[accepted]


@given(SCORES, SCORES, st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_a_generous_limit_keeps_exactly_the_best_of_both(held: list[float], new: list[float], over: int) -> None:
    kept, _ = after_exchange(torch.tensor(held), torch.tensor(new), len(new) + over)
    assert sorted(kept.tolist()) == sorted(held + new)[-len(held) :]


@given(SCORES, SCORES, st.integers(0, 10))
@settings(max_examples=150, deadline=None)
def test_a_limit_bounds_how_much_changes_and_spends_it_on_the_best(
    held: list[float], new: list[float], limit: int
) -> None:
    kept, changed = after_exchange(torch.tensor(held), torch.tensor(new), limit)
    assert len(changed) <= limit
    allowed = sorted(new)[::-1][:limit]
    assert sorted(kept.tolist()) == sorted(held + allowed)[-len(held) :]


def keep_rounds(w_div: float, gamma: float, rounds: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of 200 meets 40 candidates a round, 70 % of them of class 0 -> its classes and confidence."""
    generator = random_from(5)
    skew = torch.tensor([0.7, 0.1, 0.1, 0.1])

    def made(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        classes = torch.multinomial(skew, n, replacement=True, generator=generator)
        return classes, torch.rand(n, generator=generator)

    def scored(c: torch.Tensor, p: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        log_phi = selection.log_modulation(c, p, counts, w_div, gamma)
        return log_phi + selection.gumbel_noise(len(c), generator)

    classes, confidence = made(200)
    for _ in range(rounds):
        new_classes, new_confidence = made(40)
        counts = selection.class_counts(torch.cat([classes, new_classes]), 4)
        slots, winners, accepted = selection.exchange(
            scored(classes, confidence, counts), scored(new_classes, new_confidence, counts), limit=20
        )
        classes[slots[accepted]] = new_classes[winners[accepted]]
        confidence[slots[accepted]] = new_confidence[winners[accepted]]
    return classes, confidence


@pytest.fixture(scope="module")
def left_alone() -> tuple[torch.Tensor, torch.Tensor]:
    return keep_rounds(0.0, 0.0)


def test_w_div_balances_a_skewed_buffer_over_rounds(left_alone: tuple[torch.Tensor, torch.Tensor]) -> None:
    plain = selection.class_counts(left_alone[0], 4) / 200
    balanced = selection.class_counts(keep_rounds(2.0, 0.0)[0], 4) / 200
    assert plain[0] > 0.6
    assert balanced[0] < 0.45
    assert balanced[1:].min() > plain[1:].max()


def test_gamma_moves_the_difficulty_of_what_stays(left_alone: tuple[torch.Tensor, torch.Tensor]) -> None:
    plain, hard, easy = left_alone[1], keep_rounds(0.0, 2.0)[1], keep_rounds(0.0, -2.0)[1]
    assert plain.mean().item() == pytest.approx(0.5, abs=0.1)
    assert hard.mean() < plain.mean() - 0.15
    assert easy.mean() > plain.mean() + 0.15
