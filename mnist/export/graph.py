"""The model as an ONNX file, with everything from pixels to probabilities in it."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mnist.cli import InputError
from mnist.data import IMAGE_SHAPE, MEAN, STD
from mnist.distributed import World
from mnist.evaluation.scoring import predict
from mnist.export.page import MAKER
from mnist.model import CLASSES, MLP

if TYPE_CHECKING:
    from onnx import ModelProto

_OPERATORS = 17  # of ONNX: since 2022 in all that runs it, and all that are needed here
_VERSION = 8  # of the file's format, of the same time
_TRIED = 100  # images


def onnx_bytes(model: MLP, *, floats: bool) -> tuple[bytes, float]:
    """The file, and by how much its probabilities differ from the model's at most, on random
    images.

    Its input is ``images``, N×28×28, light ink on 0; its output ``probabilities``, N×10, float32.

    Args:
        model: in float32, on the CPU.
        floats: take float32 of 0 to 1, rather than uint8 of 0 to 255.

    Raises:
        InputError: the package ``onnx`` is missing.
    """
    try:
        from onnx.reference import ReferenceEvaluator
    except ImportError:
        raise InputError(
            "--format onnx takes the package onnx: pip install onnx, or pip install '.[onnx]'"
        ) from None
    made = _build(model, floats)
    shape = (_TRIED, *IMAGE_SHAPE)
    images: NDArray[Any] = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if floats:
        images = (images / 255).astype(np.float32)
    (found,) = ReferenceEvaluator(made).run(None, {"images": images})
    difference = float(np.abs(found - np.exp(predict(model, images, World()))).max())
    if not difference < 1e-5:
        raise RuntimeError(f"what the ONNX file says differs by {difference} from the model")
    contents: bytes = made.SerializeToString(deterministic=True)
    return contents, difference


def _build(model: MLP, floats: bool) -> "ModelProto":
    from onnx import TensorProto, checker, helper, numpy_helper

    held = {
        "pixels": np.array([-1, IMAGE_SHAPE[0] * IMAGE_SHAPE[1]]),
        "scale": np.float32(1 / STD if floats else 1 / (255 * STD)),
        "offset": np.float32(-MEAN / STD),
    }
    nodes = [] if floats else [helper.make_node("Cast", ["images"], ["floats"], to=1)]
    nodes += [
        helper.make_node("Reshape", ["images" if floats else "floats", "pixels"], ["rows"]),
        helper.make_node("Mul", ["rows", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["hidden0"]),
    ]
    for number, layer in enumerate(model.layers):
        weight, bias = f"weight{number}", f"bias{number}"
        held[weight], held[bias] = (t.detach().numpy() for t in (layer.weight, layer.bias))
        last = number + 1 == len(model.layers)
        out = "logits" if last else f"linear{number}"
        nodes.append(helper.make_node("Gemm", [f"hidden{number}", weight, bias], [out], transB=1))
        if not last:
            nodes.append(helper.make_node("Relu", [out], [f"hidden{number + 1}"]))
    notes = {"input": "light ink on a ground of 0, as MNIST's"}
    if model.doubt is not None:
        held["temperature"] = np.float32(model.doubt.temperature)
        nodes.append(helper.make_node("Div", ["logits", "temperature"], ["tempered"]))
        notes["accepted"] = f"a probability of {model.doubt.threshold} or more"
    out = "logits" if model.doubt is None else "tempered"
    nodes.append(helper.make_node("Softmax", [out], ["probabilities"], axis=1))
    kind = TensorProto.FLOAT if floats else TensorProto.UINT8
    images = helper.make_tensor_value_info("images", kind, ["N", *IMAGE_SHAPE])
    answers = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", CLASSES])
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    graph = helper.make_graph(nodes, "digits", [images], [answers], tensors)
    made = helper.make_model(
        graph,
        producer_name=MAKER,
        ir_version=_VERSION,
        opset_imports=[helper.make_opsetid("", _OPERATORS)],
    )
    helper.set_model_props(made, notes)
    checker.check_model(made, full_check=True)
    return made
