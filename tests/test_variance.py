"How sure a mean is, and the planner: limits, ways to ask, and what is refused."

import math
import warnings

import numpy as np
import pytest
from fastcore.test import expect_fail

from tiny_nbdev.core import seed_for
from tiny_nbdev.errors import InputError
from tiny_nbdev.evaluate.variance import (
    Wording,
    accuracy_variance,
    half_width,
    plan_episodes,
    read_shares,
    said_shares,
    spread,
    spread_of_csv,
)
from tiny_nbdev.measure import mean_ci


def rng_of(*names):
    return np.random.default_rng(seed_for("variance", *names))


def beta_of(accuracy, sigma):  # Parameters of the Beta distribution with this mean and spread
    n = accuracy * (1 - accuracy) / sigma**2 - 1
    return accuracy * n, (1 - accuracy) * n


def test_limits_of_the_formula():
    assert (
        accuracy_variance(0.5, 0.5, 7, 1) == accuracy_variance(0.5, 0.5, 7, 1000) == 0.25 / 7
    )  # episodes that succeed or fail as a whole: queries are no use
    assert (
        abs(accuracy_variance(0.9, 0.0, 10, 20) - 0.09 / 200) < 1e-15
        and abs(accuracy_variance(0.9, 0.0, 1, 200) - 0.09 / 200) < 1e-15
    )  # no spread: only the total counts
    assert abs(accuracy_variance(0.9, 0.04, 10, math.inf) - 0.00016) < 1e-15
    assert accuracy_variance(0.87, 0.05, np.arange(1, 4)[:, None], np.array([25, 75])).shape == (3, 2)
    assert half_width(0.9, 0.05, 1, 75) == math.inf and half_width(0.9, 0.05, np.array([1, 2, 3]), 75)[0] == math.inf
    values = np.resize([1.0, -1.0], 120) * math.sqrt(120 * accuracy_variance(0.93, 0.028, 120, 2975))
    values /= values.std(ddof=1) / math.sqrt(
        120 * accuracy_variance(0.93, 0.028, 120, 2975)
    )  # 120 numbers with just this spread
    assert (
        abs(half_width(0.93, 0.028, 120, 2975) - mean_ci(values)[1]) < 1e-12
    )  # the interval that `mean_ci` finds in them
    assert (
        abs(half_width(0.87, 0.05, 10**6, 50, level=0.6827) / math.sqrt(accuracy_variance(0.87, 0.05, 10**6, 50)) - 1)
        < 1e-3
    )  # one standard error
    with expect_fail(InputError, contains="such as 0.87"):
        accuracy_variance(87, 5, 600, 75)
    with expect_fail(InputError, contains="from 0 to 0.336"):
        accuracy_variance(0.87, 0.4, 600, 75)
    with expect_fail(InputError, contains="n_query is 0"):
        accuracy_variance(0.87, 0.05, 600, 0)
    with expect_fail(InputError, contains="level of 95"):
        half_width(0.87, 0.05, 600, 75, level=95)


def test_spread(tmp_path):
    q = np.resize([20, 75, 300], 200)  # unequal numbers of queries
    rng = rng_of("spread")
    found = []
    for _ in range(400):
        x = rng.binomial(q, rng.beta(*beta_of(0.87, 0.05), 200)) / q
        found.append(spread(x, q))
    squares = np.array([f["sigma"] ** 2 for f in found])
    assert abs(squares.mean() - 0.0025) < 4 * squares.std() / 20 and np.mean([f["sd"] for f in found]) > 0.06
    inside = np.mean([f["sigma_low"] <= 0.05 <= f["sigma_high"] for f in found])
    assert 0.85 < inside < 0.97  # Beta has longer tails than the normal
    f = found[0]
    assert abs(f["n_query"] - 3 / (1 / 20 + 1 / 75 + 1 / 300)) < 0.5
    assert abs(np.mean([f["sd"] ** 2 for f in found]) / accuracy_variance(0.87, 0.05, 1, f["n_query"]) - 1) < 0.05, (
        "Eq. 6 with the harmonic mean"
    )
    exact = spread([0.2, 0.8], 2975)
    assert exact["sigma"] < exact["sd"] == np.std([0.2, 0.8], ddof=1) and spread([0.5, 0.5, 0.5], 10)["sigma"] == 0
    few = spread(rng.binomial(2975, rng.beta(*beta_of(0.74, 0.06), 5)) / 2975, 2975)
    print(
        f"five episodes, true spread 6 points: found {100 * few['sigma']:.1f}, but anything from "
        f"{100 * few['sigma_low']:.1f} to {100 * few['sigma_high']:.1f} would do"
    )
    assert few["sigma_high"] > 4 * few["sigma_low"]

    file = tmp_path / "conv4.csv"
    file.write_text("episode,accuracy,n_query\n0,0.80,75\n1,0.90,75\n2,0.85,75\n")
    assert spread_of_csv(file) == spread([0.8, 0.9, 0.85], 75)
    with expect_fail(InputError, contains="does not exist"):
        spread_of_csv("nowhere.csv")
    with expect_fail(InputError, contains="at least two"):
        spread([0.5], 75)
    with expect_fail(InputError, contains="fewer than two"):
        spread([0.5, 0.6], [75, 1])
    with expect_fail(InputError, contains="1 episode was given"):
        spread([0.5], 75)
    with expect_fail(InputError, contains="No episodes were given"):
        spread([], 75)
    with expect_fail(InputError, contains="is a folder"):
        spread_of_csv(tmp_path)
    for text, says in (
        ("a,b\n1,2\n", "columns accuracy"),
        ("accuracy,n_query\n0.8,75\nnan,75\n", "conv4.csv: An episode's accuracy"),
        ("accuracy,n_query\n0.8,75\n", "conv4.csv: 1 episode was given"),
        ("accuracy,n_query\n0.8,\0\n", "conv4.csv"),
        ("accuracy,n_query\n0.8,75\nx,75\n", "no number"),
        ("accuracy,n_query\n0.8,75\n80,75\n", "conv4.csv: An episode's accuracy"),
        ("", "no rows"),
    ):
        file.write_text(text)
        with expect_fail(InputError, contains=says):
            spread_of_csv(file)


def test_three_give_the_fourth():
    least = lambda f, goal, **kw: next(n for n in range(2, 10**6) if f(n, **kw) <= goal)
    x = plan_episodes(0.9, 0.04, n_episodes=60, n_query=75)
    assert (
        x.found == "half_width"
        and x.variance == accuracy_variance(0.9, 0.04, 60, 75)
        and abs(x.half_width - half_width(0.9, 0.04, 60, 75)) < 1e-12
    )
    x = plan_episodes(0.9, 0.04, half_width=0.01, n_query=75)
    assert (
        x.found == "n_episodes"
        and x.n_episodes == least(lambda n: half_width(0.9, 0.04, n, 75), 0.01)
        and x.half_width <= 0.01
    )
    x = plan_episodes(0.9, 0.04, half_width=0.011, n_episodes=60)
    assert (
        x.found == "n_query"
        and x.n_query == least(lambda n: half_width(0.9, 0.04, 60, n), 0.011)
        and x.floor < x.half_width <= 0.011
    )
    for approximate in (False, True):
        x = plan_episodes(0.9, 0.04, n_episodes=60, n_query=75, approximate=approximate)
        for goal in (dict(half_width=x.half_width), dict(variance=x.variance)):
            assert (
                plan_episodes(0.9, 0.04, n_query=75, **goal, approximate=approximate).n_episodes == 60
                and plan_episodes(0.9, 0.04, n_episodes=60, **goal, approximate=approximate).n_query == 75
            )
            assert (
                abs(plan_episodes(0.9, n_episodes=60, n_query=75, **goal, approximate=approximate).sigma - 0.04) < 1e-12
            )
    print(plan_episodes(0.9, 0.04, half_width=0.01, n_query=75, seconds_per_episode=60))
    assert (
        plan_episodes(0.9, 0.04, half_width=0.01, n_query=75, seconds_per_episode=60).seconds
        == 60 * plan_episodes(0.9, 0.04, half_width=0.01, n_query=75).n_episodes
    )


def test_the_cheapest_pair_is_that_of_a_search():
    def by_search(c, most):  # Least cost
        P, Q = np.arange(2, 1000)[:, None], np.arange(1, most + 1)[None]
        return np.where(half_width(0.9, 0.04, P, Q) <= 0.02, P * (c + Q), math.inf).min()

    for c, most in ((30, 120), (2, 60), (0, 40), (5000, 90)):
        x = plan_episodes(0.9, 0.04, half_width=0.02, seconds_per_episode=c, seconds_per_query=1, max_query=most)
        assert (
            x.found == "cheapest"
            and x.half_width <= 0.02 * (1 + 1e-9)
            and x.seconds == by_search(c, most)
            and x.n_query <= most
        )
    x = plan_episodes(0.9, 0.04, variance=1e-5, seconds_per_episode=3000, seconds_per_query=1)
    assert abs(x.n_query / math.sqrt((0.09 - 0.0016) / 0.0016 * 3000) - 1) < 0.05 and x.variance <= 1e-5 * (1 + 1e-9)
    assert (
        plan_episodes(0.9, 0.04, half_width=0.02, seconds_per_episode=1, max_query=50).n_query == 50
    )  # queries for nothing: all of them
    assert plan_episodes(0.9, 0.0, half_width=0.02, seconds_per_episode=30, seconds_per_query=1).half_width <= 0.02


def test_what_cannot_be():
    for says, args in {
        (
            "the spread between episodes alone, however many queries are asked, still gives an interval of "
            "±0.0103; take at least 64 episodes"
        ): dict(half_width=0.01, n_episodes=60),
        "all 75 queries of an episode still give an interval of ±0.0136": dict(
            half_width=0.01, n_episodes=60, max_query=75
        ),
        "still gives a variance of 1.6e-05": dict(variance=1e-5, n_episodes=100),
        "One episode has no interval": dict(half_width=0.01, n_episodes=1),
        "Too many episodes": dict(half_width=1e-9, n_query=75),
        "Nothing is missing": dict(half_width=0.01, n_episodes=60, n_query=75),
        "give two of": dict(n_episodes=60),
        "Both n_episodes and n_query": dict(half_width=0.01),
        "without end": dict(half_width=0.01, seconds_per_episode=1),
        "Both a half_width and a variance": dict(half_width=0.01, variance=1e-5, n_query=75),
        "half_width is 0; give a number between 0 and 1, such as 0.005": dict(half_width=0.0, n_query=75),
        "half_width is 1.5": dict(half_width=1.5, n_query=75),
        "n_query is 7.5": dict(half_width=0.01, n_query=7.5),
        "n_episodes is 0": dict(n_episodes=0, n_query=75),
        "only 200 queries": dict(half_width=0.01, n_query=300, max_query=200),
        "price of -1": dict(half_width=0.01, n_query=75, seconds_per_episode=-1),
    }.items():
        with expect_fail(InputError, contains=says):
            plan_episodes(0.9, 0.04, **args)
    with expect_fail(InputError, contains="sigma, the spread between episodes, is missing"):
        plan_episodes(0.9, half_width=0.01, n_query=75)
    with expect_fail(InputError, contains="more than any spread"):
        plan_episodes(0.9, half_width=0.2, n_episodes=60, n_query=75)
    with expect_fail(InputError, contains="With one query"):
        plan_episodes(0.9, half_width=0.08, n_episodes=60, n_query=1)
    with expect_fail(InputError, contains="One episode has no interval"):
        plan_episodes(0.9, half_width=0.08, n_episodes=1, n_query=75)


def test_nothing_varies_or_there_is_one_episode():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's notices about infinity times nothing
        assert half_width(1.0, 0.0, 1, 75) == half_width(0.9, 0.0, 1, 75) == math.inf and half_width(1, 0, 2, 75) == 0
        assert np.array_equal(half_width(1.0, 0.0, np.array([1, 2]), 75), [math.inf, 0])
        one = plan_episodes(0.9, 0.0, n_episodes=1, n_query=75)
        assert one.half_width == one.floor == math.inf
        assert str(one) == (
            "1 episode of 75 queries: 90 %, with no interval: one episode does not show how much episodes differ; take "
            "two or more"
        )
        sure = plan_episodes(1.0, 0.0, half_width=0.01, n_query=75)
        assert (sure.n_episodes, sure.half_width, sure.floor) == (2, 0, 0)
        for accuracy, sigma in ((0.9, 0.0), (1.0, 0.0), (0.0, 0.0), (0.5, 0.5), (0.9, 0.04)):
            for known in (
                dict(n_episodes=1, n_query=1),
                dict(n_episodes=60, n_query=75),
                dict(half_width=0.02, n_query=75),
                dict(variance=1e-4, n_query=75),
                dict(variance=1e-4, n_episodes=1),
                dict(half_width=0.02, n_episodes=60),
                dict(half_width=0.02, seconds_per_episode=30, seconds_per_query=1),
                dict(half_width=0.02, seconds_per_episode=0, max_query=50),
            ):
                for wording in (None, Wording(), Wording(True, True)):
                    try:
                        said = str(plan_episodes(accuracy, sigma, **known, wording=wording))
                    except InputError as e:
                        said = str(e)
                    assert "nan" not in said and "inf" not in said.replace("infinite", "") and "\n" not in said
    assert "no spread between episodes, so that only the number of all queries" in str(
        plan_episodes(0.9, 0, n_episodes=9, n_query=9)
    )


@pytest.mark.parametrize(
    "typed,want,percent",
    [
        (("87", "5", "1"), (0.87, 0.05, 0.01), True),
        (("0.87", "0.05", "0.01"), (0.87, 0.05, 0.01), False),
        (("87", "0.5", "0.5"), (0.87, 0.005, 0.005), True),
        (("87%", "0.5", None), (0.87, 0.005, None), True),
        (("0.87", "5%", "0.01"), (0.87, 0.05, 0.01), True),
        (("0.87 %", None, None), (0.0087, None, None), True),
        ((None, "5", "0.5"), (None, 0.05, 0.005), True),
        ((None, None, "0.5"), (None, None, 0.005), True),
        (("1", None, None), (1, None, None), False),
        (("100", "0", None), (1, 0, None), True),
        (("0", "0", None), (0, 0, None), False),
        ((None, None, None), (None, None, None), False),
    ],
)
def test_percent_or_fractions(typed, want, percent):
    *shares, wording = read_shares(*typed)
    assert wording == Wording(percent, True)
    for x, y in zip(shares, want, strict=True):
        assert x is y is None or abs(x - y) < 1e-12
    said = said_shares(*shares, wording)
    assert ("percent" in said) == percent or not said
    assert bool(said) == any(t is not None for t in typed)


def test_what_is_typed_and_cannot_be():
    for typed, says in (
        (("0.87", "5", None), "--accuracy 0.87 looks like a fraction and --sigma 5 like percent"),
        (("1", None, "2"), "--accuracy 1 looks like a fraction and --half-width 2 like percent"),
        (("87,5", None, None), "--accuracy '87,5' is not a number"),
        (("87", "", None), "--sigma '' is not a number"),
        (("87", None, "nan"), "--half-width 'nan' is not a number"),
        (("inf%", None, None), "--accuracy 'inf%' is not a number"),
    ):
        with expect_fail(InputError, contains=says):
            read_shares(*typed)


def plan(capsys, args):
    "What `plan-episodes` prints, and its exit code."
    from tiny_nbdev.run.cli import main

    code = main(["plan-episodes", *args.split()])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_remedies_speak_the_unit_that_was_typed(capsys, tmp_path):
    code, said = plan(capsys, "--accuracy 93 --sigma 2.8 --half-width 0.5 --queries 2975")
    assert code == 0 and said.splitlines() == [
        "Read as percent: an accuracy of 93 %, a spread of 2.8 points, an interval of ±0.5 points",
        "127 episodes of 2,975 queries: 93 % ± 0.50 (95 %), with a spread of 2.8 points between episodes; with more "
        "queries ± 0.49 at best",
    ]
    code, said = plan(capsys, "--accuracy 0.93 --sigma 0.028 --half-width 0.005 --queries 2975")
    assert code == 0 and said.splitlines() == [
        "Read as fractions: an accuracy of 0.93, a spread of 0.028, an interval of ±0.005",
        "127 episodes of 2,975 queries: 0.93 ± 0.005 (95 %), with a spread of 0.028 between episodes; with more "
        "queries ± 0.0049 at best",
    ]
    for args, says in {
        "--accuracy 90 --sigma 4 --half-width 1 --episodes 60": "an interval of ±1.03 points; take at least 64",
        "--accuracy 0.9 --sigma 0.04 --half-width 0.01 --episodes 60": "of ±0.0103; take at least 64 episodes",
        "--accuracy 120 --sigma 4": "An accuracy of 120 % was given; write a number from 0 to 100, such as 87.",
        "--accuracy -0.5 --sigma 0.04": "An accuracy of -0.5 was given; write a fraction from 0 to 1, such as 0.87",
        "--accuracy 87 --sigma 40": "of 40 points between episodes was given; with an accuracy of 87 % it lies from 0",
        "--accuracy 0.87 --sigma 0.4": "with an accuracy of 0.87 it lies from 0 to 0.336",
        "--accuracy 87 --sigma 5 --half-width 0": "--half-width is 0 points; give a number between 0 points and 100",
        "--accuracy 87 --half-width 1": "--sigma, the spread between episodes, is missing; give it, or --half-width, "
        "--episodes and --queries",
        "--accuracy 87 --sigma 5 --episodes 9": "give two of --half-width, --episodes and --queries",
        "--accuracy 87 --sigma 5 --half-width 1": "Both --episodes and --queries are missing",
        "--accuracy 87 --sigma 5 --half-width 1 --seconds-per-episode 1": "give --seconds-per-query or --max-queries",
        "--accuracy 87 --sigma 5 --half-width 1 --episodes 1": "One episode has no interval; give --episodes from 2 up",
        "--accuracy 87 --sigma 5 --half-width 1 --queries 9 --max-queries 5": "--queries is 9, but there are only 5",
        "--accuracy 90 --half-width 0.1 --episodes 60 --queries 75": "alone give an interval of ±0.895 points",
        "--accuracy 0.9 --half-width 0.001 --episodes 60 --queries 75": "alone give an interval of ±0.00895",
        "--sigma 5 --episodes 9 --queries 9": "--accuracy is missing",
        f"--from {tmp_path}": "is a folder",
    }.items():
        code, said = plan(capsys, args)
        assert code == 2 and says in said, said
        assert not any(name in said for name in ("n_query", "n_episodes", "half_width", "variance of"))
    table = tmp_path / "conv4.csv"
    table.write_text("episode,accuracy,n_query\n0,0.80,75\n1,0.90,75\n2,0.85,75\n")
    code, said = plan(capsys, f"--from {table} --half-width 0.5 --queries 75")
    assert code == 0 and "accuracy 85 %, spread" in said and "points from 3 episodes" in said
    code, said = plan(capsys, f"--from {table} --accuracy 0.85 --half-width 0.005 --queries 75")
    assert code == 0 and "accuracy 0.85, spread 0.0" in said
