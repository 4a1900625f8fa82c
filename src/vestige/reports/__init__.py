"""The report page: one offline HTML file made from a run directory; and the pages that `vestige view` serves."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.reports._page import (
        PAGES as PAGES,
        Page as Page,
        json_for_html as json_for_html,
        make_workspace_page as make_workspace_page,
        render_page as render_page,
        report as report,
    )
    from vestige.reports._payload import (
        find_place as find_place,
        make_comparison as make_comparison,
        make_grid as make_grid,
        make_payload as make_payload,
    )
    from vestige.reports._read import (
        Fact as Fact,
        cut_command as cut_command,
        describe_cost as describe_cost,
        format_count as format_count,
        format_duration as format_duration,
        make_header as make_header,
        read_run as read_run,
        require_page as require_page,
        shorten_name as shorten_name,
    )
    from vestige.reports._texts import (
        cut as cut,
        find_overlap as find_overlap,
        find_rare_words as find_rare_words,
        read_tokens as read_tokens,
        split_words as split_words,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
