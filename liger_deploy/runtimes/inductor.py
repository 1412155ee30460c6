"""InductorSession: a bundle of AOTInductor graphs, on CPU or CUDA. Needs torch and safetensors, not transformers."""

from __future__ import annotations

import platform
import sys
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from liger_deploy.bundle import Bundle
from liger_deploy.errors import BundleError, UserError
from liger_deploy.model.window import from_ring, to_ring
from liger_deploy.runtimes.cuda_graphs import overlap_kernels
from liger_deploy.runtimes.session import BaseSession, Logits
from liger_deploy.state import Array

_CPU_RANK = ("DEFAULT", "AVX2", "AVX512")  # what `torch.backends.cpu.get_cpu_capability()` says on x86


class InductorSession(BaseSession):
    """Runs `decode` and `prefill` of one package over one copy of the weights; the state is updated in place."""

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        """Load a bundle. `threads`: of torch, for the whole process; 0 leaves them as they are.

        Raises:
            UserError: the package was made for another torch, another processor or another GPU.
            BundleError: the package or its weights do not load, or do not belong together.
        """
        super().__init__(bundle.manifest)
        _check_machine(bundle)
        if threads:
            torch.set_num_threads(threads)
        self._device = torch.device(self.manifest.graph.requires.get("device", "cpu"))
        self._tensors: tuple[torch.Tensor, ...] = ()
        self._graph: _Graph | None = None
        self._weights = _read_weights(bundle, self._device)
        self._decode, self._prefill = (_load(bundle, name, self._weights) for name in ("decode", "prefill"))

    def _run(self, tokens_BT: Array, valid_B: Array) -> Logits:
        if tokens_BT.shape[1] == 1 and valid_B.all():
            logits_BN = self._step(tokens_BT[:, 0])
        else:
            padding = self.manifest.graph.chunk - tokens_BT.shape[1]
            padded_BT = np.pad(tokens_BT, ((0, 0), (0, padding)))
            logits_BN = self._prefill(self._put(padded_BT), self._put(valid_B), *self._tensors)
        return logits_BN.cpu().numpy()  # type: ignore[no-any-return]

    def _step(self, tokens_B: Array) -> torch.Tensor:
        """On CUDA the first step runs as it is, the second is captured, and from then on it is replayed."""
        if self._graph is None:
            tokens = self._put(tokens_B)
            logits_BN: torch.Tensor = self._decode(tokens, *self._tensors)
            if self._device.type == "cuda":
                self._graph = _Graph(self._decode, tokens, self._tensors)
            return logits_BN
        return self._graph.replay(torch.from_numpy(tokens_B))

    def _put(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _read(self) -> dict[str, Array]:
        length_B = self._tensors[-1]
        found = {}
        for spec, graph, tensor in zip(self.spec.tensors, self.manifest.graph.state, self._tensors, strict=True):
            straight = from_ring(tensor, length_B) if graph.ring else tensor
            found[spec.name] = np.array(straight.to("cpu", getattr(torch, spec.dtype)).numpy())
        return found

    def _write(self, tensors: dict[str, Array], batch: int) -> None:
        length_B, new = torch.from_numpy(tensors["length"]), []
        for graph in self.manifest.graph.state:
            tensor = torch.tensor(tensors[graph.name], dtype=getattr(torch, graph.dtype))
            new.append(to_ring(tensor, length_B) if graph.ring else tensor)
        if self._tensors and len(self._tensors[-1]) == batch:  # in place: a captured step stays valid
            for kept, tensor in zip(self._tensors, new, strict=True):
                kept.copy_(tensor)
        else:
            self._clear()
            self._tensors = tuple(tensor.to(self._device) for tensor in new)

    def _start(self, batch: int) -> None:
        """Zeros are made where they are used: a GPU holds thousands of sequences."""
        self._clear()
        kinds = zip(self.spec.tensors, self.manifest.graph.state, strict=True)
        self._tensors = tuple(
            torch.zeros(batch, *spec.shape, dtype=getattr(torch, graph.dtype), device=self._device)
            for spec, graph in kinds
        )

    def _clear(self) -> None:
        self._tensors, self._graph = (), None


class _Graph:
    """One step captured as a CUDA graph, over the session's own state."""

    def __init__(self, decode: Any, tokens_B: torch.Tensor, state: tuple[torch.Tensor, ...]) -> None:
        self._tokens_B, self._graph = tokens_B, torch.cuda.CUDAGraph(keep_graph=True)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            self._logits_BN: torch.Tensor = decode(tokens_B, *state)
        if torch.cuda.get_device_capability() >= (9, 0):
            overlap_kernels(self._graph.raw_cuda_graph())
        self._graph.instantiate()

    def replay(self, tokens_B: torch.Tensor) -> torch.Tensor:
        self._tokens_B.copy_(tokens_B)
        self._graph.replay()
        return self._logits_BN


def _check_machine(bundle: Bundle) -> None:
    """The package runs here: the same torch, platform and GPU architecture, and a processor that is not older."""
    requires, path = bundle.manifest.graph.requires, bundle.path
    again = "export again with the torch and on the kind of machine that will run it"
    here = {"torch": ".".join(torch.__version__.split(".")[:2]), "platform": f"{sys.platform}-{platform.machine()}"}
    if requires.get("device") == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"{path} was exported for a GPU, and this torch sees none: export with --device cpu")
        here["compute"] = "{}.{}".format(*torch.cuda.get_device_capability())
    for name, value in here.items():
        if requires.get(name, value) != value:
            raise UserError(f"{path} was compiled for {name} {requires[name]}, here it is {value}: {again}")
    wanted, found = requires.get("cpu", "DEFAULT"), torch.backends.cpu.get_cpu_capability()
    known = wanted in _CPU_RANK and found in _CPU_RANK
    if wanted != found and not (known and _CPU_RANK.index(wanted) < _CPU_RANK.index(found)):
        raise UserError(f"{path} was compiled for a processor with {wanted}, this one has {found}: {again}")


def _read_weights(bundle: Bundle, device: torch.device) -> dict[str, torch.Tensor]:
    """Constants by name; some have two. On a CPU they are the file's pages, shared by all processes that map it."""
    try:
        with safe_open(bundle.file("weights"), "pt", str(device)) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            return weights | {name: weights[first] for name, first in (file.metadata() or {}).items()}
    except (SafetensorError, KeyError) as error:
        raise BundleError(f"{bundle.file('weights')} is no weight file of this bundle: {error}") from None


def _load(bundle: Bundle, name: str, weights: dict[str, torch.Tensor]) -> Any:
    """One graph with every constant bound: running one with an unbound constant would crash the process."""
    from torch._inductor.package import load_package  # type: ignore[attr-defined]

    path = bundle.file("model")
    try:
        graph = load_package(
            str(path), name, run_single_threaded=bundle.manifest.graph.requires.get("device") == "cuda"
        )
        wanted = graph.get_constant_fqns()
    except Exception as error:  # RuntimeError and others
        raise BundleError(f"{path} does not load: {str(error).strip().splitlines()[0]}") from None
    if missing := sorted(set(wanted) - set(weights)):
        raise BundleError(f"{bundle.file('weights')} lacks weight {missing[0]!r} of graph {name!r}")
    graph.load_constants({key: weights[key] for key in wanted}, check_full_update=True, user_managed=True)
    return graph
