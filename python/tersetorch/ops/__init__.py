"""Does it give one native op a Python face? A public function, a fake kernel, an autograd formula; a file per op."""

from tersetorch.ops._load import load_native_module, load_native_ops

load_native_module()
load_native_ops()
