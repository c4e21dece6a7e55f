"""NT-Xent with mined negatives, as the published class of the same name; its authors' run used another criterion."""

from __future__ import annotations

import warnings

from jaxtyping import Float
from torch import Tensor, nn

from fmcib_ssl.losses.contrast import Gather, Negatives, check_gather, check_negatives, check_temperature, contrast
from fmcib_ssl.losses.logsumexp import Kernel, check_kernel
from fmcib_ssl.types import ViewPairs


class NTXentNegativeMinedLoss(nn.Module):
    """Normalized, temperature-scaled cross entropy of the two views of a lesion against explicit negatives.

    Args:
        temperature: divides the cosines.
        gather_distributed: `forward` contrasts with the negatives of all ranks, with gradients: True gathers them,
            "ring" takes one rank's at a time and holds two ranks' at most. Leave it off where the caller gathers.
        negatives: what `forward` contrasts an anchor with. "mined": the mined negatives of the same view number;
            "lesions": both views of the other lesions (SimCLR); "mined_and_lesions": all of these.
        kernel: how `forward` computes the sums over negatives: "plain" holds the matrix of similarities, "streamed" and
            "triton" (GPUs) never do, and differentiate once only; "auto" takes one of the first two, by size.

    Raises:
        ValueError: `abs(temperature) < 1e-8` or not finite; an unknown choice of negatives, ranks or kernel.

    Source:
        Pai et al., Foundation model for cancer imaging biomarkers, Nat. Mach. Intell. 2024 ("mined");
        Chen et al., SimCLR, ICML 2020, eq. 1 ("lesions").
    """

    def __init__(
        self,
        temperature: float = 0.1,
        gather_distributed: Gather = False,
        negatives: Negatives = "mined",
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_negatives(negatives)
        check_gather(gather_distributed)
        check_kernel(kernel)
        if temperature < 0:
            warnings.warn(
                f"temperature {temperature} is negative: the loss then rewards similarity to the negatives "
                "and pushes the two views of a lesion apart, the opposite of contrastive learning",
                stacklevel=2,
            )
        self.temperature = temperature
        self.gather_distributed: Gather = gather_distributed
        self.kernel: Kernel = kernel
        self.negatives: Negatives = negatives

    def forward(
        self, out: ViewPairs, *, lesions: tuple[Tensor, Tensor] | None = None, first_lesion: int = 0
    ) -> Float[Tensor, ""]:
        """Mean cross entropy over the `2 * batch` anchors, in float32 (float64 if an input is).

        Args:
            out: embeddings `(batch, dim)`, not normalized; `negative` may hold another number of rows.
            lesions: both views of the lesions of all ranks, `(all_lesions, dim)`, from a caller that gathers;
                by default `out["positive"]`. Not looked at when `negatives` is "mined".
            first_lesion: the row of `lesions` that holds this rank's first lesion.

        Raises:
            AssertionError: a key is missing.
            TypeError: an embedding is not a tensor of real floats.
            ValueError: pairs, shapes, devices, or sizes across ranks do not fit, an anchor has no negative,
                or the kernel cannot compute this.
        """
        return contrast(
            out,
            temperature=self.temperature,
            negatives=self.negatives,
            lesions=lesions,
            first_lesion=first_lesion,
            gather_distributed=self.gather_distributed,
            kernel=self.kernel,
        ) / (2 * len(out["positive"][0]))

    def extra_repr(self) -> str:
        """What `print(loss)` shows."""
        return (
            f"temperature={self.temperature}, gather_distributed={self.gather_distributed}, "
            f"negatives={self.negatives!r}, kernel={self.kernel!r}"
        )
