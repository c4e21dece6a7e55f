"""Whether anything was learned: encoder -> features -> numbers with intervals -> a page.

What other rooms and notebooks take is listed in `__init__.pyi`; a name's module is imported when it is asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
