"""The operators of TensorRT's ONNX importer and their element types, from the documentation of version 11.0.

The tables contain the operators of speech models, and those that the importer refuses. Further rules of operators are in
tensorrt_rules.
"""

from __future__ import annotations

FLOATS = frozenset(("float32", "float16", "bfloat16"))
_NUMBERS = FLOATS | {"int32", "int64"}
_ALL = _NUMBERS | {"bool"}

_BY_TYPES = {
    FLOATS: """
        AveragePool BatchNormalization Ceil Clip Conv ConvTranspose Cos CumSum Elu Erf Exp Floor Gelu GlobalAveragePool
        GroupNormalization Hardmax HardSigmoid InstanceNormalization LayerNormalization LeakyRelu Log LogSoftmax MaxPool PRelu
        Reciprocal RMSNormalization RotaryEmbedding Round Selu Sigmoid Sin Softmax Softplus Softsign Sqrt Swish Tan Tanh
        """,
    FLOATS | {"int8", "float8e4m3fn"}: "Attention",
    FLOATS | {"int32"}: "TensorScatter",
    _NUMBERS: """
        Abs Add ArgMax ArgMin Div Gemm Greater GreaterOrEqual Less LessOrEqual MatMul Max Mean Min Mod Mul Neg Pad Pow Range
        ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
        Sign Sub Sum TopK
        """,
    _ALL: """
        Concat Constant ConstantOfShape DepthToSpace Einsum Equal Expand Flatten Gather GatherElements GatherND Identity If Loop
        NonMaxSuppression NonZero OneHot Reshape Resize Scan ScatterElements ScatterND Slice SpaceToDepth Split Squeeze Tile
        Transpose Trilu Unsqueeze Where
        """,
    _ALL | {"uint8", "int8", "float8e4m3fn"}: "Cast Shape Size",
    frozenset(("bool",)): "And Not Or Xor",
    frozenset(("int8", "int4", "float8e4m3fn", "float4e2m1")): "DequantizeLinear",
    FLOATS | {"int8"}: "QuantizeLinear",
}
OPERATORS = {op_type: types for types, names in _BY_TYPES.items() for op_type in names.split()}
"""Element types of the data inputs, by operator."""

_ALL_INPUTS = """
    Add And Clip Concat Conv ConvTranspose Div Equal Gemm Greater GreaterOrEqual LayerNormalization Less LessOrEqual MatMul Max
    Mean Min Mod Mul Or Pow Range RMSNormalization Sub Sum Xor
    """
DATA = {
    **dict.fromkeys(_ALL_INPUTS.split(), slice(None)),
    "Attention": slice(0, 3),
    "RotaryEmbedding": slice(0, 3),
    "TensorScatter": slice(0, 2),
    "Where": slice(1, 3),
}
"""Positions of an operator's data inputs, which must have one type. Default: the first input."""

RANDOM = frozenset("RandomNormal RandomNormalLike RandomUniform RandomUniformLike".split())
DATA_DEPENDENT = frozenset(("NonMaxSuppression", "NonZero"))
UNSUPPORTED = frozenset(
    """
    Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor ConcatFromSequence ConvInteger Det DynamicQuantizeLinear
    MatMulInteger Multinomial Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul SequenceAt
    SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SplitToSequence StringNormalizer
    TfIdfVectorizer Unique
    """.split()
)
