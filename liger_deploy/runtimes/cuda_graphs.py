"""Programmatic dependent launch inside a captured CUDA graph.

This project's kernels load what does not depend on the kernel before them (their weights, the state), and only then
wait for it (`griddepcontrol.wait`). A kernel that another kernel precedes may therefore start early; AOTInductor has no
way to launch it so, but in a captured graph it is the edge between the two that says so.
"""

from __future__ import annotations

from typing import Any

WAITING = ("_linear_step", "_attention_step")  # kernels that wait for the one before them by themselves


def overlap_kernels(graph: int) -> int:
    """Let every waiting kernel of a captured, not yet instantiated graph start before its predecessor ends.

    `graph` is the raw cudaGraph_t. Returns how many edges changed; 0 without the package cuda-bindings (part of CUDA
    builds of torch), where kernels then simply follow one another.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        return 0
    handle = driver.CUgraph(graph)
    count = _checked(driver.cuGraphGetEdges(handle, 0))[-1]
    sources, targets, data, _ = _checked(driver.cuGraphGetEdges(handle, count))
    names = {int(node): _kernel_name(driver, node) for node in (*sources, *targets)}
    changed = 0
    for source, target, edge in zip(sources, targets, data, strict=False):
        waits = any(name in names[int(target)] for name in WAITING)
        if not waits or not names[int(source)] or _incoming(targets, target) != 1:
            continue
        _checked(driver.cuGraphRemoveDependencies(handle, [source], [target], [edge], 1))
        early = driver.CUgraphEdgeData()
        early.from_port = int(driver.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC)
        early.type = int(driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC)
        _checked(driver.cuGraphAddDependencies(handle, [source], [target], [early], 1))
        changed += 1
    return changed


def _incoming(targets: list[Any], target: Any) -> int:
    return sum(int(other) == int(target) for other in targets)


def _kernel_name(driver: Any, node: Any) -> str:
    """Name of the kernel that a node launches; "" if it launches none."""
    if _checked(driver.cuGraphNodeGetType(node))[0] != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
        return ""
    parameters = _checked(driver.cuGraphKernelNodeGetParams(node))[0]
    name: bytes = _checked(driver.cuFuncGetName(parameters.func))[0]
    return name.decode()


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a driver call returns after its status."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA driver: {status}")
    return tuple(values)
