"""What is on disk is whole or absent, belongs to one command at a time, and is never mixed with files of others.

A file is written under a name of its own, fsynced and renamed: a process that is killed while writing leaves one stray
temporary file and never a torn result, and two that write the same file at once do no harm, because their bytes are
equal. A result of several files is written beside its path and moved there when it is whole (`stage_folder`). A
command holds its folder by a lock of the kernel on a file beside it, which goes with the process however that ends.
"""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.storage._files import (
        NewFile as NewFile,
        Written as Written,
        check_disk as check_disk,
        disk_error as disk_error,
        is_temporary as is_temporary,
        make_folder as make_folder,
        open_temporary as open_temporary,
        remove_durably as remove_durably,
        remove_strays as remove_strays,
        remove_strays_of as remove_strays_of,
        remove_tree as remove_tree,
        sha256_of as sha256_of,
        sha256_once as sha256_once,
        temporary_error as temporary_error,
        temporary_path as temporary_path,
        this_host as this_host,
        write_durably as write_durably,
    )
    from vestige.storage._folders import (
        find_holder as find_holder,
        find_replaced_result as find_replaced_result,
        find_result_folder as find_result_folder,
        hold_folder as hold_folder,
        is_held_by as is_held_by,
        partial_folder as partial_folder,
        remove_partial as remove_partial,
        remove_result as remove_result,
        require_no_links as require_no_links,
        require_no_others as require_no_others,
        stage_folder as stage_folder,
    )
    from vestige.storage._hub import (
        HUB as HUB,
        cache_folder as cache_folder,
        local_result as local_result,
        push_result as push_result,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
