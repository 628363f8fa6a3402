"""The hand-written backward: op pairs, the decoder layer's passes, and the driver that runs them.

No autograd graph is ever recorded here. Every op has its forward and its backward side by side; a
backward that owns a weight adds the weight's gradient into a buffer that it is handed (`dw`), and
never overwrites it: zeroing is the optimizer's.
"""
