"""Kernels of attention methods in a bundle: the first configs of each launch, compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from structc.codegen.triton.attempt import Tuned
from structc.codegen.triton.bundle_attention import MANY, compiled_groups
from structc.codegen.triton.config import Config, checked
from structc.codegen.triton.method_kernel import Key, MethodCall
from structc.codegen.triton.targets import GpuTarget
from structc.codegen.triton.tile import DTYPES


@dataclass(frozen=True)
class BuiltMethod:
    """What became of one launch.

    Attributes:
        call: the function and its sizes.
        refusal: why there is no kernel, or ``""``.
        configs: that were compiled.
    """

    call: MethodCall
    refusal: str
    configs: tuple[Config, ...] = ()

    def data(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        kernel, dtype, sizes = self.call.key
        configs = [asdict(c) for c in self.configs]
        return {"kernel": kernel, "dtype": DTYPES[dtype], "sizes": dict(sizes), "configs": configs}


def build(
    calls: Sequence[MethodCall],
    target: GpuTarget,
    cache: Path,
    progress: Callable[[str, int, int], None],
) -> list[BuiltMethod]:
    """Compile what calls launch into a cache."""
    able = [c for c in calls if c.dtype in DTYPES]
    some = [c.ordered(target.name)[:MANY] for c in able]
    jobs = [[c.job(one, target.name) for one in own] for c, own in zip(able, some, strict=True)]
    made = compiled_groups("methods", jobs, target, cache, progress)
    return [
        BuiltMethod(call, why, tuple(own[at] for at in kept))
        for call, own, (kept, why) in zip(able, some, made, strict=True)
    ]


def parse(data: Mapping[str, Any], *, rerank: bool) -> tuple[Key, Tuned[Config]]:
    """What :meth:`BuiltMethod.data` wrote.

    Errors: whatever a changed file raises.
    """
    words = {word: dtype for dtype, word in DTYPES.items()}
    sizes = tuple((str(name), int(size)) for name, size in data["sizes"].items())
    configs = tuple(checked(c) for c in data["configs"])
    return (str(data["kernel"]), words[data["dtype"]], sizes), Tuned(configs, rerank)
