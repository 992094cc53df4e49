"""The CUDA C++ kernels compile for Hopper GPUs, and their registers suffice; no GPU is needed.

NVRTC is not among the packages of the other tests: ``make test-nvrtc`` adds it.
"""

import re
from pathlib import Path

import pytest
import test_hopper_layer

from pi05_ros.engine.kernels import (
    hopper_gate_up,
    hopper_layout,
    hopper_prefill_attention,
    hopper_prefill_down,
    hopper_prefill_qkv,
    hopper_vision_attention,
    hopper_vision_product,
    nvrtc,
)
from pi05_ros.engine.kernels.hopper_vision_product import Shape, choose_tiling
from pi05_ros.engine.kernels.nvrtc import compile_image
from pi05_ros.engine.pipeline import BackendError
from pi05_ros.model.config import Pi05Config

pytest.importorskip('cuda.bindings', reason='make test-nvrtc installs NVRTC')

_FULL = Pi05Config.full()
_PROCESSORS = 132
_SPILLS = re.compile(r'(\d+) bytes spill stores, (\d+) bytes spill loads')


def _compile(source: Path, macros: dict[str, int | str]) -> str:
    """Compile for a Hopper GPU; return what is said about registers."""
    image, said = compile_image(source, (*macros.items(),), 'sm_90', ['--ptxas-options=-v'])
    assert image.startswith(b'\x7fELF')
    return said


def _assert_no_spills(said: str, kernels: int) -> None:
    spills = _SPILLS.findall(said)
    assert len(spills) == kernels, said
    assert all(pair == ('0', '0') for pair in spills), said


def _denoise_source() -> Path:
    return Path(hopper_layout.__file__).with_name('hopper_layer.cu')


@pytest.mark.parametrize(
    'horizon, prefix', [(1, 320), (10, 576), (50, 768), (50, 1024), (64, 768)]
)
def test_the_denoise_keeps_its_values_in_registers(horizon, prefix):
    plan = hopper_layout.hopper_plan(_FULL.expert, horizon, prefix, _PROCESSORS)
    said = _compile(_denoise_source(), hopper_layout.defines(plan, _FULL, horizon))
    _assert_no_spills(said, kernels=6)


@pytest.mark.parametrize('horizon', test_hopper_layer._PLANS)
def test_the_denoise_compiles_as_its_tests_cut_it_on_a_gpu(horizon):
    plan, config = test_hopper_layer._PLANS[horizon], test_hopper_layer._CONFIG
    _compile(_denoise_source(), hopper_layout.defines(plan, config, horizon))


@pytest.mark.parametrize('views', [1, 2, 3])
@pytest.mark.parametrize('name', ['qkv', 'out', 'fc1', 'fc2', 'projector'])
def test_products_of_vision_keep_their_values_in_registers(views, name):
    vision = _FULL.vision
    rows, width = views * vision.tokens_per_view, vision.width
    features, depth = {
        'qkv': (3 * width, width), 'out': (width, width), 'fc1': (vision.mlp_dim, width),
        'fc2': (width, vision.mlp_dim), 'projector': (_FULL.vlm.width, width),
    }[name]  # fmt: skip
    macros = choose_tiling(Shape(rows, features, depth), _PROCESSORS).defines()
    if name in ('out', 'fc2'):
        macros['RESIDUAL'] = 1
    else:
        writer = width if name == 'fc1' else vision.mlp_dim  # K of the product that wrote x
        part = choose_tiling(Shape(rows, width, writer), _PROCESSORS).features
        macros |= {'PARTS': -(-width // part), 'PART_FEATURES': part}
    if name == 'fc1':
        macros['GELU'] = 1
    source = Path(hopper_vision_product.__file__).with_suffix('.cu')
    _assert_no_spills(_compile(source, macros), kernels=1)


@pytest.mark.parametrize('heads', [8, 0])
@pytest.mark.parametrize('rows', [296, 456, 552, 576, 712, 968, 1536])
def test_the_projection_of_the_prefill_keeps_its_values_in_registers(rows, heads):
    vlm = _FULL.vlm
    features = (heads + 2) * vlm.head_dim
    tiling = hopper_prefill_qkv.choose_tiling(rows, features, _PROCESSORS)
    source = Path(hopper_prefill_qkv.__file__).with_suffix('.cu')
    said = _compile(source, tiling.defines())
    _assert_no_spills(said, kernels=1)
    assert 'serialized' not in said


@pytest.mark.parametrize('rows', [296, 456, 552, 576, 712, 968])
def test_gate_and_up_of_the_prefill_keep_their_values_in_registers(rows):
    vlm = _FULL.vlm
    tiling = hopper_gate_up.choose_tiling(rows, 2 * vlm.mlp_dim, vlm.width, _PROCESSORS)
    source = Path(hopper_gate_up.__file__).with_suffix('.cu')
    said = _compile(source, tiling.defines())
    _assert_no_spills(said, kernels=1)
    assert 'serialized' not in said


@pytest.mark.parametrize('rows', [296, 456, 552, 712, 968])
def test_the_down_projection_of_the_prefill_keeps_its_values_in_registers(rows):
    vlm = _FULL.vlm
    tiling = hopper_prefill_down.choose_tiling(rows, vlm.width, vlm.mlp_dim, _PROCESSORS)
    source = Path(hopper_prefill_down.__file__).with_suffix('.cu')
    said = _compile(source, tiling.defines())
    _assert_no_spills(said, kernels=1)
    assert 'serialized' not in said


def test_the_attention_of_the_prefill_keeps_its_values_in_registers():
    source = Path(hopper_prefill_attention.__file__).with_suffix('.cu')
    _assert_no_spills(_compile(source, {}), kernels=1)


@pytest.mark.parametrize('views', [1, 2, 3])
def test_the_attention_of_vision_keeps_its_values_in_registers(views):
    vision = _FULL.vision
    rows = views * vision.tokens_per_view
    tiling = hopper_vision_attention.choose_tiling(rows, vision.num_heads, _PROCESSORS)
    source = Path(hopper_vision_attention.__file__).with_suffix('.cu')
    said = _compile(source, tiling.defines(vision.num_heads))
    _assert_no_spills(said, kernels=1)
    assert 'serialized' not in said


def test_what_was_compiled_once_comes_from_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    source = tmp_path / 'one.cu'
    source.write_text('extern "C" __global__ void f(int* p) { *p = VALUE; }')
    first = nvrtc._image(source, (('VALUE', 1),), 'sm_90')
    with monkeypatch.context() as patched:
        patched.setattr(nvrtc, 'compile_image', lambda *_: pytest.fail('compiled again'))
        assert nvrtc._image(source, (('VALUE', 1),), 'sm_90') == first
    assert nvrtc._image(source, (('VALUE', 2),), 'sm_90') != first
    source.write_text('extern "C" __global__ void f(int* p) { *p = VALUE + 1; }')
    assert nvrtc._image(source, (('VALUE', 1),), 'sm_90') != first


def test_a_source_that_does_not_compile_is_said():
    source = Path(hopper_gate_up.__file__).with_suffix('.cu')
    with pytest.raises(BackendError, match=r'hopper_gate_up.cu does not compile: .*FEATURES'):
        _compile(source, {})
