"""Open Images from its public buckets: ``urls`` (the published files), ``http`` (reading them with retries),
``request`` (what a download asks for), ``tables`` (the large tables, filtered while they are read), ``selection``
(which images), and ``images`` (their files)."""
