"""SparseGPT's kernel for GPUs in Triton's interpreter, which must be on before triton is imported: the tests run in a process of their own."""

import os
import subprocess
import sys

import pytest
import torch


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton", reason="pip install 'hf-prune[sparse]'")

if not INTERPRETED:

    @pytest.mark.timeout(600)
    def test_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert " passed" in done.stdout

    def test_compiles_without_a_gpu(tmp_path, monkeypatch):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        from hf_prune.methods.slab_kernel import _slab

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        constants = {"N": 2, "M": 4, "DROPPED": True, "SIZE": 128, "ROWS": 32}
        types = dict.fromkeys(("slab", "decay", "gone", "curvature"), "*fp32") | {"dropped": "*i8"}
        types |= dict.fromkeys(("size", "rows", "stride"), "i32")
        names = [*types, *constants]
        source = ASTSource(
            _slab,
            signature={**types, **dict.fromkeys(constants, "constexpr")},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        text = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
        assert ".local" not in text  # nothing lies on a stack

else:
    from hf_prune.methods import slab_kernel, sparsegpt
    from hf_prune.methods.base import Job
    from hf_prune.patterns import parse
    from hf_prune.statistics import Hessian

    @pytest.mark.parametrize("earlier", [False, True])
    @pytest.mark.parametrize("pattern", ["2:4", "50%", "1:3", "4:8", "fixed"])
    def test_equals_the_walk_by_columns(pattern, earlier, monkeypatch):
        """Two linears of one input, rows that fill no program, a last slab that is cut off, and ties."""
        generator = torch.Generator().manual_seed(0)
        hessian = Hessian(72)
        hessian.update(torch.randn(200, 72, generator=generator) @ torch.randn(72, 72, generator=generator))
        jobs = []
        for rows in (33, 5):
            weight = torch.randn(rows, 72, generator=generator)
            weight[:, 12:24] = 0.0
            kept = torch.rand(rows, 72, generator=generator) > 0.1 if earlier else None
            fixed = torch.rand(rows, 72, generator=generator) > 0.5 if pattern == "fixed" else None
            jobs.append(Job(weight, (hessian,), parse("2:4" if pattern == "fixed" else pattern), kept, fixed))
        method = sparsegpt.SparseGPT(block_size=32)
        expected = method.prune(jobs, "matrix")
        calls, solve = [], slab_kernel.solve_slab
        monkeypatch.setattr(slab_kernel, "solve_slab", lambda *args: calls.append(args) or solve(*args))
        monkeypatch.setattr(sparsegpt, "_slab_kernel", lambda device, columns: slab_kernel)
        for got, wanted in zip(method.prune(jobs, "matrix"), expected):
            assert torch.equal(got.mask, wanted.mask)
            torch.testing.assert_close(got.weight, wanted.weight, atol=1e-5, rtol=1e-5)
            assert not got.weight[~got.mask].any()
        assert len(calls) == 3

    def test_where_it_does_not_run(monkeypatch):
        assert sparsegpt._slab_kernel(torch.device("cpu"), 128) is None
        monkeypatch.setattr(slab_kernel, "solve_slab", lambda *args, **kwargs: 1 / 0)
        with pytest.warns(UserWarning, match="division by zero"):
            assert sparsegpt._kernel_on.__wrapped__(torch.device("cpu")) is None
        monkeypatch.undo()
        assert sparsegpt._kernel_on.__wrapped__(torch.device("cpu")) is slab_kernel  # the interpreter's
