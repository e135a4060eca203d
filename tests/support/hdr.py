"""HdrHistogram, the one import of its Python package."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # hdrhistogram 0.10.8 packs two structures without a `_layout_`, which Python 3.14 deprecates and 3.19 refuses. The
    # fields are whole octets, so all layouts are the same. No other maintained package has this format. A fix is
    # pending upstream (https://github.com/HdrHistogram/HdrHistogram_py/pull/57); delete the filter when it is released.
    warnings.filterwarnings("ignore", "Due to '_pack_', the '(External|Payload)Header' Structure", DeprecationWarning)
    from hdrh.codec import HdrCookieException, HdrHistogramSettingsException, HdrLengthException
    from hdrh.histogram import HdrHistogram

UNDECODABLE = (HdrCookieException, HdrHistogramSettingsException, HdrLengthException)
"""The errors of decoding a text that is no histogram, in addition to the interpreter's own errors."""

__all__ = ["UNDECODABLE", "HdrHistogram"]
