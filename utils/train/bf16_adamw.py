"""AdamW for weights in bf16. Its updates are rounded at random, so that small updates are not lost.

A bf16 number has 8 significant bits. If the new weight is rounded to the nearest number, an update of less than 1/512
of the weight is lost. Most updates of fine-tuning are that small. With stochastic rounding, a number is rounded up with
the probability that makes the expected result equal to the exact number.

The random bits depend only on the seed, the step and the parameter. So a resumed run draws the same bits, and all
processes of a run draw the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch

from utils.fast.constants import STEP_CHUNK

_LOW_BITS = 0xFFFF


def round_randomly(exact: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return fp32 numbers rounded to bf16. `exact` is overwritten.

    `noise` has uniformly random integers from 0 to 65535, in int32. They are added to the 16 bits that bf16 does not
    have, and these bits are then removed.
    """
    bits = exact.view(torch.int32)
    bits.add_(noise).bitwise_and_(~_LOW_BITS)
    return exact.to(torch.bfloat16)


class BF16AdamW(torch.optim.Optimizer):
    """AdamW whose weights and first moments are in bf16 and rounded stochastically. The second moments are in fp32.

    All updates are computed in fp32, in chunks. A bf16 parameter takes 10 bytes, including its moments and a bf16
    gradient. A parameter in fp32 keeps its dtype and is not rounded.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {'lr': lr, 'betas': betas, 'eps': eps, 'weight_decay': weight_decay})
        for group in self.param_groups:
            for parameter in group['params']:
                parameter.data = parameter.data.contiguous()
        self._seed = seed
        # The number by which the gradients of the next step are multiplied, to clip them.
        self._factor: torch.Tensor | float = 1.0
        # Random 32-bit words for one chunk, with the step and the device for which they were drawn.
        self._words: tuple[int, torch.device, torch.Tensor] | None = None

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """Return the norm of all gradients, in fp32. The next step clips the gradients to `max_norm`.

        The gradients themselves are not changed, because the clipped gradients would be rounded to bf16.
        """
        gradients = [p.grad for group in self.param_groups for p in group['params'] if p.grad is not None]
        norms = [
            torch.linalg.vector_norm(part.float()) for gradient in gradients for part in _parts(gradient.reshape(-1))
        ]
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        self._factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        index = 0
        for group in self.param_groups:
            for parameter in group['params']:
                if parameter.grad is not None:
                    self._update(parameter, group, index)
                index += 1
        self._factor = 1.0

    def _update(self, parameter: Any, group: dict[str, Any], index: int) -> None:
        """Update one parameter. `index` is its position among all parameters."""
        state = self.state[parameter]
        if not state:
            state['step'] = 0
            state['exp_avg'] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state['exp_avg_sq'] = torch.zeros_like(state['exp_avg'], dtype=torch.float32)
        state['step'] += 1

        step = state['step']
        gradients = parameter.grad.reshape(-1)
        beta_1, beta_2 = group['betas']
        rate = group['lr'] / (1 - beta_1**step)
        root = math.sqrt(1 - beta_2**step)
        factor = self._factor
        if isinstance(factor, torch.Tensor):
            factor = factor.to(parameter.device)

        tensors = (parameter, gradients, state['exp_avg'], state['exp_avg_sq'])
        for part, (weight, gradient, mean, square) in enumerate(zip(*map(_parts, tensors), strict=True)):
            exact_gradient = gradient.float() * factor
            exact_mean = mean.float().lerp_(exact_gradient, 1 - beta_1)
            square.mul_(beta_2).addcmul_(exact_gradient, exact_gradient, value=1 - beta_2)
            scale = square.sqrt().div_(root).add_(group['eps'])
            exact_weight = weight.float().mul_(1 - group['lr'] * group['weight_decay'])
            exact_weight.addcdiv_(exact_mean, scale, value=-rate)

            words = self._random_words(step, index, part, weight)
            _store(weight, exact_weight, words & _LOW_BITS)
            _store(mean, exact_mean, (words >> 16) & _LOW_BITS)

    def _random_words(self, step: int, index: int, part: int, like: torch.Tensor) -> torch.Tensor:
        """Return one random 32-bit word for each value of a part (see `_parts`) of a parameter.

        Drawing new words for all values would take longer than the update. So the words of a step are drawn once, and
        each part combines them with its own random word by exclusive or. Each word is then still uniformly distributed.
        """
        if self._words is None or self._words[:2] != (step, like.device):
            generator = torch.Generator(like.device).manual_seed(_word(self._seed, step))
            words = torch.empty(STEP_CHUNK, dtype=torch.int32, device=like.device)
            self._words = (step, like.device, words.random_(-(2**31), 2**31, generator=generator))
        own = _word(self._seed, step, index, part) - 2**31
        return self._words[2][: len(like)] ^ own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state with fp32 second moments, which the base class would convert to the parameter's dtype."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group['params']]
        for index, stored in state_dict['state'].items():
            parameter = parameters[index]
            self.state[parameter]['exp_avg_sq'] = stored['exp_avg_sq'].to(parameter.device, copy=True)


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split a tensor into parts: flat views of at most STEP_CHUNK values."""
    parts: tuple[torch.Tensor, ...] = tensor.view(-1).split(STEP_CHUNK)
    return parts


def _store(target: torch.Tensor, exact: torch.Tensor, noise: torch.Tensor) -> None:
    """Write fp32 values to `target`. They are rounded only if `target` is in bf16."""
    target.copy_(exact if target.dtype == torch.float32 else round_randomly(exact, noise))


def _word(*numbers: int) -> int:
    """Return 32 bits that look random and depend only on these numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest())
