"""What a client's noise amounts to: epsilon of differential privacy, by the library dp-accounting."""

from __future__ import annotations

from pocketzo.arguments import check_integer, check_number
from pocketzo.packages import require


def epsilon(noise: float, answers: int, delta: float = 1e-5) -> float:
    """Return the epsilon that covers all data of a client, against everyone but the client itself.

    Each answer is a Gaussian mechanism: its n clipped scalars change by at most 2 clip sqrt(n) whatever the data is,
    and the noise's standard deviation is ``noise`` times that.

    Parameters
    ----------
    noise : float
        That of the plan.
    answers : int
        Rounds in which scalars left the client.
    delta : float
        The probability that epsilon does not cover, in (0, 1).

    Raises
    ------
    MissingExtraError, BrokenPackageError
        The package dp-accounting is not installed, or cannot be imported.
    """
    check_number("noise", noise, positive=True)
    check_integer("answers", answers, 0)
    check_number("delta", delta, positive=True, most=1.0)
    require("dp-accounting")
    import dp_accounting
    from dp_accounting import pld

    accountant = pld.PLDAccountant()
    event = dp_accounting.GaussianDpEvent(noise)
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, answers) if answers else dp_accounting.NoOpDpEvent())
    return float(accountant.get_epsilon(delta))
