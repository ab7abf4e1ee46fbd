"""Losses that compare the rows of one request with each other. What they cost grows with the pairs or rows, never with padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlenv.errors import ConfigError, check_at_least
from mlenv.modules.losses import weighted_binary_cross_entropy, weighted_mean


@dataclass(frozen=True, kw_only=True)
class PairwiseLossConfig:
    cross_entropy: float = 1.0
    """Weight of the binary cross-entropy that is added to keep the level of predictions; 0 learns the order only."""

    reads_requests: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_at_least("cross_entropy", self.cross_entropy, 0)

    def build(self) -> PairwiseLoss:
        return PairwiseLoss(self)


class PairwiseLoss(nn.Module):
    """Every positive of a request is to score above every negative of it.

    ``log(1 + exp(logit[negative] - logit[positive]))``, averaged over all pairs of the batch. A pair weighs the product of
    its rows' weights; with soft labels, times ``y[i] (1 - y[j])``, the chance that i is positive and j negative.

    Source: Burges et al., "Learning to Rank using Gradient Descent", ICML 2005 (RankNet); the cross-entropy beside it:
    Sculley, "Combined Regression and Ranking", KDD 2010.
    """

    def __init__(self, config: PairwiseLossConfig) -> None:
        super().__init__()
        self.cross_entropy = config.cross_entropy

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor, requests: Tensor | None) -> Tensor:
        """Shapes are those of ``LossConfig``."""
        positive, negative = weights * labels, weights * (1 - labels)
        better, worse = request_pairs(number_requests(requests), (positive > 0).any(1), (negative > 0).any(1))
        losses = functional.softplus(logits.index_select(0, worse) - logits.index_select(0, better))
        pair_weights = positive[better] * negative[worse] * (better != worse).unsqueeze(1)
        ranking = weighted_mean(losses, pair_weights)
        return ranking + self.cross_entropy * weighted_binary_cross_entropy(logits, labels, weights)


@dataclass(frozen=True, kw_only=True)
class ListwiseLossConfig:
    cross_entropy: float = 1.0
    """Weight of the binary cross-entropy that is added to keep the level of predictions; 0 learns the order only."""

    reads_requests: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_at_least("cross_entropy", self.cross_entropy, 0)

    def build(self) -> ListwiseLoss:
        return ListwiseLoss(self)


class ListwiseLoss(nn.Module):
    """The softmax over the rows of a request is to lie on its positives.

    ``-sum_i y[i] log(exp(logit[i]) / sum_j exp(logit[j]))`` over the rows of a request, averaged over the positives of all
    requests that have both classes: a request counts by the weight of its positives. Weights also enter the sum over j.

    Source: Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007 (ListNet, top one), with
    labels as the target; the cross-entropy beside it: Sculley, "Combined Regression and Ranking", KDD 2010.
    """

    def __init__(self, config: ListwiseLossConfig) -> None:
        super().__init__()
        self.cross_entropy = config.cross_entropy

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor, requests: Tensor | None) -> Tensor:
        """Shapes are those of ``LossConfig``."""
        own = number_requests(requests)
        has_negative = _sum_by(own, weights * (1 - labels)) > 0
        positive = weights * labels * has_negative.index_select(0, own)
        losses = _log_sum_exp_by(own, logits + weights.log()).index_select(0, own) - logits
        return weighted_mean(losses, positive) + self.cross_entropy * weighted_binary_cross_entropy(logits, labels, weights)


def number_requests(requests: Tensor | None) -> Tensor:
    """Requests as numbers from 0 on."""
    if requests is None:
        raise ConfigError("requests", expected="the request of every row", received=None, fix="read the batches with the extra 'requests'")
    numbers: Tensor = torch.unique(requests, return_inverse=True)[1]
    return numbers


def request_pairs(own: Tensor, is_left: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of a left and a right row of the same request, as row numbers.

    The right rows are sorted by request, so that the partners of a left row are a range of them.
    """
    left, right = is_left.nonzero().squeeze(1), is_right.nonzero().squeeze(1)
    right = right[own[right].argsort(stable=True)]
    sizes = torch.bincount(own[right], minlength=own.shape[0])
    starts = (sizes.cumsum(0) - sizes)[own[left]]
    partners = sizes[own[left]]
    before = partners.cumsum(0) - partners
    pair = torch.arange(int(partners.sum()), device=own.device)
    return left.repeat_interleave(partners), right[pair + (starts - before).repeat_interleave(partners)]


def _sum_by(own: Tensor, values: Tensor) -> Tensor:
    """Sums over the rows of each request; one row of zeros for every number that is not used."""
    return torch.zeros_like(values).index_add(0, own, values)


def _log_sum_exp_by(own: Tensor, values: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials over the rows of each request; 0 where all are minus infinity."""
    peak = torch.zeros_like(values).scatter_reduce(0, own.unsqueeze(1).expand_as(values), values.detach(), "amax", include_self=False)
    peak = peak.masked_fill(peak.isinf(), 0)
    total = _sum_by(own, (values - peak.index_select(0, own)).exp())
    return total.masked_fill(total == 0, 1).log() + peak
