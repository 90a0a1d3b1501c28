"""Who runs next: the queue, admission, chunks, rows and pages. Host code only: no arrays of a device."""
