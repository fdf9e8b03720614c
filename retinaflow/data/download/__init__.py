"""Open Images from its public buckets: ``addresses`` (what lies where), ``fetching`` (one polite, patient reader),
``tables`` (the large tables, filtered while they stream), ``choosing`` (which images), ``pictures`` (their files)."""
