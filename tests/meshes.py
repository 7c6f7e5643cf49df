"""Meshes of groups for tests of models under FSDP2, in processes that form one world after another."""

from __future__ import annotations

import secrets

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def mesh_of_groups(groups: int, workers: int) -> DeviceMesh:
    """A mesh with the dimensions of groups and of places in a group.

    DTensor keeps equal meshes, and the process groups of an earlier world would come back with them: names make each
    mesh unlike all others.
    """
    mark = secrets.token_hex(4)
    return init_device_mesh("cpu", (groups, workers), mesh_dim_names=(f"groups {mark}", f"places {mark}"))


def places_of(mesh: DeviceMesh) -> DeviceMesh:
    """The part of a mesh that is this worker's group."""
    assert mesh.mesh_dim_names is not None
    return mesh[mesh.mesh_dim_names[1]]


def counterparts_of(mesh: DeviceMesh) -> DeviceMesh:
    assert mesh.mesh_dim_names is not None
    return mesh[mesh.mesh_dim_names[0]]
