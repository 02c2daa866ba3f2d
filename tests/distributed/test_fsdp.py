"""What is used of FSDP2's private classes, pinned: a release that changes it shows here, by name."""

from __future__ import annotations

import dataclasses
import inspect

from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group, _fsdp_state


def test_a_parameter_of_a_group_is_made_as_before():
    wanted = ["param", "module_info", "mesh_info", "post_forward_mesh_info", "device", "shard_placement_fn",
              "mp_policy", "offload_policy"]  # fmt: skip
    assert list(inspect.signature(_fsdp_param.FSDPParam.__init__).parameters)[1:] == wanted
    assert list(inspect.signature(_fsdp_param.FSDPParam.init_dtype_attrs).parameters) == ["self", "mp_policy"]
    fields = [field.name for field in dataclasses.fields(_fsdp_param.ParamModuleInfo)]
    assert fields[:2] == ["module", "param_name"]


def test_a_group_reads_its_list_of_parameters_in_every_step():
    group = _fsdp_param_group.FSDPParamGroup
    made = inspect.getsource(group.__init__)
    for name in ("fsdp_params", "mesh_info", "post_forward_mesh_info", "device", "mp_policy", "offload_policy"):
        assert f"self.{name} = " in made, name
    for method in (group.unshard, group.wait_for_unshard, group.post_backward, group._to_sharded, group._to_unsharded):
        assert "self.fsdp_params" in inspect.getsource(method), method.__name__
    assert "_fsdp_param_groups" in inspect.getsource(_fsdp_state.FSDPState)
