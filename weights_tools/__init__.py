"""Programs that make, read, change and check checkpoint folders."""

from __future__ import annotations

if __name__ != "glmimg.weights_tools":
    raise ImportError("import glmimg.weights_tools: this folder is not a package of its own")
