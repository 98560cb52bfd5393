"""Bits per byte and scores, and differences of them, with 95 % confidence intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from .bits_per_byte import paired_gain

CONFIDENCE = 0.95
RESAMPLES = 2000
RESAMPLES_AT_ONCE = 100  # so that tens of thousands of questions need little memory
SEED = 0  # of the resampling: equal numbers give equal intervals


@dataclass(frozen=True)
class Gain:
    """A difference in bits per byte, with its uncertainty over documents.

    Attributes:
        value: the bits per byte saved.
        low, high: the 95 % confidence interval, by bootstrapping documents; nan for fewer than two.
        stderr: the standard error; nan for fewer than two.
    """

    value: float
    low: float
    high: float
    stderr: float

    def __str__(self) -> str:
        value, low, high = (
            f"{round(number, 4) + 0.0:+.4f}" for number in (self.value, self.low, self.high)
        )  # no -0.0000
        return value if math.isnan(self.low) else f"{value} [{low}, {high}]"


def bits_per_byte(nats: np.ndarray, text_bytes: np.ndarray) -> float:
    """Return bits per UTF-8 byte; nan if there are no bytes.

    Args:
        nats: of each document or window.
        text_bytes: of the same.
    """
    total = text_bytes.sum()
    return float(nats.sum() / math.log(2) / total) if total else math.nan


def gain(saved_nats: np.ndarray, text_bytes: np.ndarray, groups: Sequence[str] | None = None) -> Gain:
    """Return the bits per byte saved, with its interval.

    Args:
        saved_nats: (N,), the difference between two measurements of the same text.
        text_bytes: (N,), the bytes of that text.
        groups: the document of each of the N. Those of one document are resampled together.
            Default: each is a document of its own.
    """
    if groups is not None:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        saved_nats, text_bytes = (np.bincount(group, values) for values in (saved_nats, text_bytes))
    value, stderr = paired_gain(saved_nats, text_bytes)
    if math.isnan(stderr):
        return Gain(value, math.nan, math.nan, stderr)

    def ratio(saved: np.ndarray, size: np.ndarray, axis: int) -> np.ndarray:
        return saved.sum(axis) / size.sum(axis) / math.log(2)

    return Gain(value, *_bootstrapped((saved_nats, text_bytes), ratio, paired=True), stderr)


@dataclass(frozen=True)
class Score:
    """A mean over questions.

    Attributes:
        value: the mean.
        low, high: its 95 % interval: Wilson's for shares of right answers, else by bootstrapping
            questions; nan for a single question that is not simply right or wrong.
        questions: their number.
    """

    value: float
    low: float
    high: float
    questions: int

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Score":
        """Return the mean of the questions' values; nan if there are none."""
        numbers = np.asarray(values, dtype=float)
        low, high = math.nan, math.nan
        if not len(numbers):
            return cls(math.nan, low, high, 0)
        if set(numbers) <= {0.0, 1.0}:
            right = stats.binomtest(int(numbers.sum()), len(numbers))
            low, high = right.proportion_ci(CONFIDENCE, method="wilson")
        elif len(numbers) > 1:
            low, high = _bootstrapped((numbers,), np.mean, batch=RESAMPLES_AT_ONCE)
        return cls(float(numbers.mean()), float(low), float(high), len(numbers))

    @classmethod
    def difference(cls, values: Sequence[float], others: Sequence[float]) -> "Score":
        """Return the mean difference over the same questions.

        Its interval is Agresti and Min's (2005) for shares of right answers, which is no point even
        if all answers stayed the same; else questions are resampled in pairs.
        """
        numbers = np.asarray(values) - np.asarray(others)
        low, high = math.nan, math.nan
        if {*values, *others} <= {0.0, 1.0}:
            better, worse, total = ((numbers > 0).sum() + 0.5, (numbers < 0).sum() + 0.5, len(numbers) + 2)
            middle = (better - worse) / total
            half = stats.norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt((better + worse) / total - middle**2) / total**0.5
            low, high = middle - half, middle + half
        elif len(numbers) > 1:
            low, high = _bootstrapped((numbers,), np.mean, batch=RESAMPLES_AT_ONCE)
        return cls(float(numbers.mean()), float(low), float(high), len(numbers))

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def __str__(self) -> str:
        return format(self, ".3f")


def _bootstrapped(samples: Sequence[np.ndarray], statistic: Callable, **settings: Any) -> tuple[float, float]:
    """Return the percentile interval of a statistic of at least two numbers.

    Args:
        samples, statistic, settings: as for `scipy.stats.bootstrap`.
    """
    interval = stats.bootstrap(
        samples,
        statistic,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
        **settings,
    ).confidence_interval
    return float(interval.low), float(interval.high)
