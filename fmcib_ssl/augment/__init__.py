"""Views of patches: random transforms of whole batches, on any device; MONAI's are applied patch by patch.

What other rooms take is listed in `__init__.pyi`; the module of a name is imported when it is asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
