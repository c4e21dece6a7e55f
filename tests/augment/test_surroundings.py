"""Surroundings taken away, against a loop over voxels."""

from __future__ import annotations

import math

import pytest
import torch

from fmcib_ssl.augment import BatchedViews, RandomContextRemoval

SIZE = (8, 12, 14)
SEEDS = torch.arange(100, 140)


def patches(num: int) -> torch.Tensor:
    return torch.randint(-1000, 400, (num, 1, *SIZE), generator=torch.Generator().manual_seed(0)).float()


def test_a_soft_ball_stays_and_the_rest_is_one_intensity() -> None:
    transform = RandomContextRemoval(1.0, radius=(2.0, 5.0), softness=0.5, noise_std_hu=0.0)
    params, given = transform.draw(SEEDS, SIZE), patches(len(SEEDS))
    found = transform.apply(given, params)
    for view in (0, 17):
        radius, fill_hu = float(params.radius[view]), float(params.fill_hu[view])
        for place in [(4, 6, 7), (4, 6, 9), (4, 9, 7), (2, 6, 7), (0, 0, 0), (7, 11, 13)]:
            kept = 1 / (1 + math.exp(-(radius - math.dist(place, (4, 6, 7))) / 0.5))
            expected = kept * float(given[view, 0][place]) + (1 - kept) * fill_hu
            assert float(found[view, 0][place]) == pytest.approx(expected, abs=0.01)


def test_what_is_drawn_is_within_its_bounds_and_lung_as_often_as_asked_for() -> None:
    transform = RandomContextRemoval(0.5, radius=(3, 4), lung_prob=0.8, lung_hu=(-900, -800), tissue_hu=(0, 50))
    params = transform.draw(torch.arange(4000), SIZE)
    lung = (params.fill_hu >= -900) & (params.fill_hu <= -800)
    assert (lung | ((params.fill_hu >= 0) & (params.fill_hu <= 50))).all()
    assert ((params.radius >= 3) & (params.radius <= 4)).all()
    # Four standard errors of a share of 4000.
    assert lung.float().mean() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 4000))
    assert params.active.float().mean() == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 4000))


def test_noise_has_its_deviation_and_the_untouched_stay_as_they_are() -> None:
    transform = RandomContextRemoval(0.5, radius=(0.0, 0.0), softness=0.1, noise_std_hu=30.0)
    params, given = transform.draw(SEEDS, SIZE), patches(len(SEEDS))
    found = transform.apply(given, params)
    torch.testing.assert_close(found[~params.active], given[~params.active])
    rest = found[params.active][:, 0, :, :3] - params.fill_hu[params.active].view(-1, 1, 1, 1)
    assert rest.std() == pytest.approx(30, rel=0.02) and abs(rest.mean()) < 1


def test_a_view_follows_from_its_seed_alone() -> None:
    views = BatchedViews({"surroundings": RandomContextRemoval(0.7)})
    given = patches(len(SEEDS)).to(torch.int16)
    together = views(given, SEEDS)
    for number in (0, 5, 39):
        torch.testing.assert_close(views(given[number, None], SEEDS[number, None])[0], together[number])


@pytest.mark.parametrize("wrong", [{"radius": (5.0, 2.0)}, {"softness": 0.0}, {"lung_prob": 1.5}, {"noise_std_hu": -1}])
def test_senseless_arguments_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RandomContextRemoval(0.5, **wrong)  # type: ignore[arg-type]
