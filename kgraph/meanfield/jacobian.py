"""First two moments of the squared singular values of a chain's input-output Jacobian.

    J = W_L D_L ... W_1 D_1,   D_l = diag phi'(z_l)
    mean = prod chi_1,   variance / mean^2 = sum_l (mu_2 / mu_1^2 - 1 - s_1)

s_1 = 0 for orthogonal weights and -1 for Gaussian ones: at criticality sigma_JJ^2 = L (mu_2 / mu_1^2 - 1 - s_1).

Source: Pennington, Schoenholz, Ganguli 2017, arXiv 1711.04735; Xiao et al. 2018, arXiv 1806.05393.
"""

from __future__ import annotations

from dataclasses import dataclass

from kgraph.meanfield.phases import MeanField

gaussian_s1 = -1.0
"""First coefficient of the S-transform of a square Gaussian matrix; 0 for an orthogonal one."""


@dataclass(frozen=True)
class JacobianMoments:
    """Moments of the eigenvalues of ``J J^T`` of a Jacobian J [n, n0] in the limit of wide layers.

    Attributes:
        mean: tr(J J^T) / n, the mean squared singular value.
        second: tr((J J^T)^2) / n.
        size: n.
    """

    mean: float = 1.0
    second: float = 1.0
    size: int = 1

    @property
    def variance(self) -> float:
        """``sigma_JJ^2``."""
        return max(self.second - self.mean**2, 0.0)

    def through_slopes(self, mu_1: float, mu_2: float) -> JacobianMoments:
        """``D J``: D is free of J, so that m_2' = mu_1^2 (m_2 - m_1^2) + mu_2 m_1^2."""
        second = mu_1**2 * (self.second - self.mean**2) + mu_2 * self.mean**2
        return JacobianMoments(mu_1 * self.mean, second, self.size)

    def through_weights(self, first: float, second: float, size: int) -> JacobianMoments:
        """``W J`` for W [size, n]: m_2' = t_2 m_1^2 + t_1^2 (size / n) (m_2 - m_1^2).

        Args:
            first, second: t_1 = tr(W W^T) / size (which is sigma_w^2) and t_2 = tr((W W^T)^2) / size.
            size: rows of W.
        """
        spread = self.second - self.mean**2
        return JacobianMoments(first * self.mean, second * self.mean**2 + first**2 * (size / self.size) * spread, size)


def chain_jacobian(point: MeanField, depth: int, *, s_1: float = 0.0) -> JacobianMoments:
    """Moments after ``depth`` square layers at a point of the phase diagram.

    Args:
        s_1: 0 for orthogonal weights, `gaussian_s1` = -1 for Gaussian ones.
    """
    mean = point.chi_1**depth
    variance = mean**2 * depth * (point.slope_spread - s_1)
    return JacobianMoments(mean, variance + mean**2)
