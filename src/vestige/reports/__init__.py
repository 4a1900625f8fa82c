"""The report page: one offline HTML file made from a run directory, and the same page served live."""

from vestige.reports._header import compact as compact, duration as duration, header_of as header_of
from vestige.reports._page import (
    json_for_html as json_for_html,
    make_server as make_server,
    render_page as render_page,
    report as report,
    view as view,
)
from vestige.reports._payload import make_grid as make_grid, payload_of as payload_of, place_of as place_of
from vestige.reports._read import Wording as Wording, read_run as read_run
from vestige.reports._texts import (
    cut as cut,
    overlap as overlap,
    rare_words as rare_words,
    readable_tokens as readable_tokens,
    words_of as words_of,
)
