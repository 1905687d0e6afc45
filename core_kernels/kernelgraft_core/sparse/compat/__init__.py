"""The interfaces of other sparse convolution libraries on this one's kernels, for model code that is written for them.

They are not put in those libraries' places by themselves: ``kernelgraft.load_plugin("sparse-conv", facade="spconv")``
does that, and takes it back.
"""
