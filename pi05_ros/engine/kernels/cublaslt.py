"""Linear layers through cuBLASLt, with fused bias, GELU and residual, and a chosen algorithm.

``torch.nn.functional.linear`` takes the library's first guess and cannot add a residual in the
same call. Here the epilogue does bias, tanh-GELU and the residual add, nothing is allocated, and
the algorithm of each shape can be one that was timed on this GPU (:mod:`pi05_ros.engine.tuning`).
Names follow NVIDIA's cuBLASLt API reference.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..pipeline import BackendError
from ..tuning import TunedChoices, tuned_rows

_log = logging.getLogger(__name__)

WORKSPACE_BYTES = 32 * 1024 * 1024

_COMPUTE_32F = 68
_DATA_TYPES = {torch.float32: 0, torch.bfloat16: 14}
_OP_N, _OP_T = 0, 1
_DESC_TRANSA, _DESC_TRANSB, _DESC_EPILOGUE, _DESC_BIAS_POINTER = 3, 4, 7, 8
_EPILOGUE_DEFAULT, _EPILOGUE_BIAS, _EPILOGUE_GELU_BIAS = 1, 4, 36
_PREFERENCE_MAX_WORKSPACE, _PREFERENCE_REDUCTION_MASK = 1, 3
# Partial sums of a split K are kept in fp32 in the workspace: the schemes that round them to
# bfloat16 on the way are left out.
_REDUCTION_COMPUTE_TYPE = 2
_MAX_CANDIDATES = 64


class _Algorithm(ctypes.Structure):
    _fields_ = (('data', ctypes.c_uint64 * 8),)


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ('algorithm', _Algorithm),
        ('workspace_bytes', ctypes.c_size_t),
        ('state', ctypes.c_int),
        ('waves', ctypes.c_float),
        ('reserved', ctypes.c_int * 4),
    )


@dataclass(frozen=True)
class LinearSignature:
    """What determines the kernel of ``out = act(x @ weight.T + bias) + residual``."""

    rows: int
    out_features: int
    in_features: int
    dtype: str
    out_dtype: str
    bias: bool
    gelu: bool
    residual: bool

    @property
    def key(self) -> str:
        """Return the name under which a tuned algorithm is stored."""
        parts = [f'{self.rows}x{self.in_features}-{self.out_features}', self.dtype]
        if self.out_dtype != self.dtype:
            parts.append(self.out_dtype)
        parts += [name for name in ('bias', 'gelu', 'residual') if getattr(self, name)]
        return '-'.join(parts)


class _Plan:
    """Descriptors and algorithm of one signature; kept for as long as the library handle."""

    def __init__(self, library: CublasLt, signature: LinearSignature) -> None:
        lib = library.lib
        self.signature = signature
        dtype = _DATA_TYPES[getattr(torch, signature.dtype)]
        out_dtype = _DATA_TYPES[getattr(torch, signature.out_dtype)]
        m, n, k = signature.out_features, signature.rows, signature.in_features
        self.desc = ctypes.c_void_p()
        library.check(lib.cublasLtMatmulDescCreate(ctypes.byref(self.desc), _COMPUTE_32F, 0))
        self.set_int(lib, _DESC_TRANSA, _OP_T)
        self.set_int(lib, _DESC_TRANSB, _OP_N)
        epilogue = _EPILOGUE_DEFAULT
        if signature.gelu:
            epilogue = _EPILOGUE_GELU_BIAS
        elif signature.bias:
            epilogue = _EPILOGUE_BIAS
        self.set_int(lib, _DESC_EPILOGUE, epilogue)
        # Row-major (rows, features) is column-major (features, rows): cuBLAS computes
        # out.T = weight @ x.T, and both operands are contiguous along K.
        self.weight = library.layout(dtype, k, m)
        self.x = library.layout(dtype, k, n)
        self.out = library.layout(out_dtype, m, n)
        self.alpha = ctypes.c_float(1.0)
        self.beta = ctypes.c_float(1.0 if signature.residual else 0.0)
        self.algorithm: _Algorithm | None = None

    def set_int(self, lib: Any, attribute: int, value: int) -> None:
        number = ctypes.c_int32(value)
        lib.cublasLtMatmulDescSetAttribute(
            self.desc, attribute, ctypes.byref(number), ctypes.c_size_t(4)
        )

    def set_bias(self, lib: Any, bias: torch.Tensor) -> None:
        pointer = ctypes.c_void_p(bias.data_ptr())
        lib.cublasLtMatmulDescSetAttribute(
            self.desc, _DESC_BIAS_POINTER, ctypes.byref(pointer), ctypes.c_size_t(8)
        )


class CublasLt:
    """One library handle with its workspace, for one device and one stream at a time.

    Args:
        device: CUDA device.
        choices: algorithms found by timing. A shape without one gets that of the next number of
            rows that is timed, or the library's first guess.
    Raises:
        BackendError: the library that PyTorch loaded cannot be reached.
    """

    def __init__(self, device: torch.device, choices: TunedChoices) -> None:
        self.lib = _load_library()
        self.device = device
        self.choices = choices
        self.handle = ctypes.c_void_p()
        with torch.cuda.device(device):
            self.check(self.lib.cublasLtCreate(ctypes.byref(self.handle)))
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._plans: dict[LinearSignature, _Plan] = {}
        self._preference = self._make_preference()

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        gelu: bool = False,
    ) -> None:
        """Enqueue ``out = act(x @ weight.T + bias) + residual`` on the current stream.

        Args:
            x: (M, K) contiguous. weight: (N, K) contiguous. out: (M, N) contiguous; may be the
                same memory as ``residual``.
            bias: (N,) in out's dtype. residual: (M, N) in out's dtype.
            gelu: apply the tanh-approximated GELU after the bias (needs a bias, no residual).
        """
        plan = self._plan(signature_of(x, weight, out, bias, residual, gelu))
        if bias is not None:
            plan.set_bias(self.lib, bias)
        self._run(plan, x, weight, out, residual)

    def candidates(
        self, signature: LinearSignature, relatives: Iterable[LinearSignature] = ()
    ) -> list[str]:
        """Return the algorithms to try for a shape, the library's first guess first.

        Args:
            relatives: shapes whose suggestions are tried too, where they are valid: for another
                number of rows the library often suggests what is best here (H200: 8 % on the
                down projection of 576 rows).
        """
        plan = self._plan(signature)
        found = [_to_hex(entry.algorithm) for entry in self._heuristics(plan)]
        for relative in relatives:
            for entry in self._heuristics(self._plan(relative)):
                algorithm = _to_hex(entry.algorithm)
                if algorithm not in found and self._accepts(plan, entry.algorithm):
                    found.append(algorithm)
        return found

    def use(self, signature: LinearSignature, algorithm: str) -> None:
        """Run a shape with this algorithm from now on."""
        self._plan(signature).algorithm = _from_hex(algorithm)

    def version(self) -> int:
        """Return the library's version; an algorithm is only valid for the one that gave it."""
        return int(self.lib.cublasLtGetVersion())

    def layout(self, data_type: int, rows: int, columns: int) -> ctypes.c_void_p:
        """Return a column-major matrix layout without padding."""
        handle = ctypes.c_void_p()
        self.check(
            self.lib.cublasLtMatrixLayoutCreate(
                ctypes.byref(handle),
                data_type,
                ctypes.c_uint64(rows),
                ctypes.c_uint64(columns),
                ctypes.c_int64(rows),
            )
        )
        return handle

    def check(self, status: int) -> None:
        """Turn a cuBLAS status into an error."""
        if status:
            raise BackendError(f'cuBLASLt {self.version()} answered with status {status}')

    def _plan(self, signature: LinearSignature) -> _Plan:
        plan = self._plans.get(signature)
        if plan is None:
            plan = self._plans[signature] = _Plan(self, signature)
            stored = stored_algorithm(self.choices, signature, self.version())
            if stored is not None and self._accepts(plan, _from_hex(stored)):
                plan.algorithm = _from_hex(stored)
            else:
                plan.algorithm = self._heuristics(plan)[0].algorithm
                if stored is not None:
                    _log.warning(
                        '%s: %s does not take the algorithm of %s, the library chooses; '
                        "'pi05-ros tune' finds a better one",
                        signature.key, self.choices.gpu, self.choices.source,
                    )  # fmt: skip
        return plan

    def _heuristics(self, plan: _Plan) -> list[_Heuristic]:
        found = (_Heuristic * _MAX_CANDIDATES)()
        count = ctypes.c_int()
        status = self.lib.cublasLtMatmulAlgoGetHeuristic(
            self.handle,
            plan.desc,
            plan.weight,
            plan.x,
            plan.out,
            plan.out,
            self._preference,
            _MAX_CANDIDATES,
            found,
            ctypes.byref(count),
        )
        usable = [entry for entry in found[: count.value] if entry.state == 0]
        if status or not usable:
            raise BackendError(
                f'cuBLASLt {self.version()} has no algorithm for {plan.signature.key} '
                f'(status {status}); widths must be multiples of 8'
            )
        return usable

    def _accepts(self, plan: _Plan, algorithm: _Algorithm) -> bool:
        result = _Heuristic()
        status = self.lib.cublasLtMatmulAlgoCheck(
            self.handle,
            plan.desc,
            plan.weight,
            plan.x,
            plan.out,
            plan.out,
            ctypes.byref(algorithm),
            ctypes.byref(result),
        )
        return not status and not result.state and result.workspace_bytes <= WORKSPACE_BYTES

    def _run(
        self,
        plan: _Plan,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> None:
        assert plan.algorithm is not None
        source = out if residual is None else residual
        stream = torch.cuda.current_stream(self.device).cuda_stream
        status = self.lib.cublasLtMatmul(
            self.handle,
            plan.desc,
            ctypes.byref(plan.alpha),
            ctypes.c_void_p(weight.data_ptr()),
            plan.weight,
            ctypes.c_void_p(x.data_ptr()),
            plan.x,
            ctypes.byref(plan.beta),
            ctypes.c_void_p(source.data_ptr()),
            plan.out,
            ctypes.c_void_p(out.data_ptr()),
            plan.out,
            ctypes.byref(plan.algorithm),
            ctypes.c_void_p(self.workspace.data_ptr()),
            ctypes.c_size_t(WORKSPACE_BYTES),
            ctypes.c_void_p(stream),
        )
        if status:
            raise BackendError(f'cuBLASLt status {status} for {plan.signature.key}')

    def _make_preference(self) -> ctypes.c_void_p:
        preference = ctypes.c_void_p()
        self.check(self.lib.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
        for attribute, value, kind in (
            (_PREFERENCE_MAX_WORKSPACE, WORKSPACE_BYTES, ctypes.c_uint64),
            (_PREFERENCE_REDUCTION_MASK, _REDUCTION_COMPUTE_TYPE, ctypes.c_uint32),
        ):
            number = kind(value)
            self.check(
                self.lib.cublasLtMatmulPreferenceSetAttribute(
                    preference,
                    attribute,
                    ctypes.byref(number),
                    ctypes.c_size_t(ctypes.sizeof(number)),
                )
            )
        return preference


def signature_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gelu: bool,
) -> LinearSignature:
    """Return the signature of one call, checking what cuBLASLt would take as garbage."""
    for name, tensor in (('x', x), ('weight', weight), ('out', out)):
        if not tensor.is_contiguous():
            raise BackendError(f'linear: {name} {tuple(tensor.shape)} must be contiguous')
    if gelu and (bias is None or residual is not None):
        raise BackendError('linear: gelu needs a bias and no residual')
    return LinearSignature(
        rows=x.shape[0],
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        dtype=str(x.dtype).removeprefix('torch.'),
        out_dtype=str(out.dtype).removeprefix('torch.'),
        bias=bias is not None,
        gelu=gelu,
        residual=residual is not None,
    )


def stored_algorithm(
    choices: TunedChoices, signature: LinearSignature, version: int
) -> str | None:
    """Return what was found for a shape, or else for it with the next number of rows timed."""
    larger = replace(signature, rows=tuned_rows(signature.rows))
    exact = choices.algorithm(signature.key, version)
    return choices.algorithm(larger.key, version) if exact is None else exact


def linear_plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gelu: bool = False,
) -> None:
    """Do what :meth:`CublasLt.linear` does, in plain PyTorch on any device."""
    result = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if gelu:
        result = torch.nn.functional.gelu(result, approximate='tanh')
    out.copy_(result if residual is None else result + residual)


def _load_library() -> Any:
    """Return the cuBLASLt that PyTorch itself loaded."""
    if torch.version.cuda is None:
        raise BackendError('this PyTorch was built without CUDA; install a CUDA build')
    name = f'libcublasLt.so.{torch.version.cuda.split(".")[0]}'
    torch.cuda.init()
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise BackendError(f'{name}, which PyTorch {torch.__version__} needs: {error}') from None
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    return library


def _to_hex(algorithm: _Algorithm) -> str:
    return bytes(algorithm).hex()


def _from_hex(text: str) -> _Algorithm:
    return _Algorithm.from_buffer_copy(bytes.fromhex(text))
