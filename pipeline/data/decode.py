"""The FFCV decoder of all images: cut a given box out of the stored image and resize it to the size that the model sees.

FFCV's own random decoders draw from numba's per-thread generators, which nothing can seed; here the boxes come from outside,
in a table that compiled code reads at a fixed address, so that a new epoch fills in new boxes and recompiles nothing.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State
from numba import carray, types
from numba.extending import intrinsic

TOP, LEFT, HEIGHT, WIDTH = range(4)
decode_jpg = Compiler.compile(imdecode)
resize = Compiler.compile(resize_crop)


@intrinsic
def _pointer(typing_context, address):
    """The integer ``address`` as a pointer, in compiled code."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.uintp), codegen


class BoxDecoder(SimpleRGBImageDecoder):  # FFCV takes an operation for a decoder only if it is of the field's decoder class
    """Decode to (B, size, size, 3) uint8. A box of the whole image at ``size`` gives the stored pixels unchanged.

    Args:
        boxes: (samples, 4) int32, (top, left, height, width) of every sample; the caller sets the rows that an epoch visits
            before it starts. A stored JPEG that cannot be decoded sets the height of its box to 0.
        size: side of the output in pixels.
    """

    def __init__(self, boxes: np.ndarray, size: int):
        super().__init__()
        assert boxes.dtype == np.int32 and boxes.flags.c_contiguous
        self.boxes = boxes  # compiled code holds its address: it must live as long as this object
        self.shape = (size, size, 3)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """FFCV's hook: the kind of output, and the buffer for it."""
        dtype = np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=self.shape, dtype=dtype), AllocationQuery(self.shape, dtype)

    def generate_code(self) -> Callable:
        """FFCV's hook: the function that numba compiles."""
        address, count = self.boxes.ctypes.data, len(self.boxes)
        jpg = IMAGE_MODES["jpg"]
        read = self.memory_read
        parallel_range = Compiler.get_iterator()

        def decode(batch_indices, destination, metadata, storage_state):
            boxes = carray(_pointer(address), (count, 4), np.int32)
            for slot in parallel_range(len(batch_indices)):
                sample = batch_indices[slot]
                field = metadata[sample]
                height, width = np.int64(field["height"]), np.int64(field["width"])
                stored = read(field["data_ptr"], storage_state)
                if field["mode"] == jpg:
                    pixels = np.empty((height, width, 3), np.uint8)  # one image per thread, not FFCV's five whole batches
                    if decode_jpg(stored, pixels, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                        boxes[sample, HEIGHT] = 0
                else:
                    pixels = stored.reshape((height, width, 3))
                top, left = np.int64(boxes[sample, TOP]), np.int64(boxes[sample, LEFT])
                bottom, right = top + boxes[sample, HEIGHT], left + boxes[sample, WIDTH]
                if bottom > top:
                    resize(pixels, top, bottom, left, right, destination[slot])
            return destination[: len(batch_indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode
