"""Urza, the registry: artifacts, blueprints and compile jobs over HTTP, facts in SQL, bytes in a blob store.

    esper urza serve                     # SQLite and a folder, nothing to configure
    esper urza token add trainer --role read

The parts, from the outside in: :mod:`~esper.services.urza.serve` runs the process, :mod:`~esper.services.urza.app` puts
the routes together, :mod:`~esper.services.urza.service` holds what they share, ``*_store`` modules speak SQL, and
:mod:`~esper.services.urza.blobs` keeps the bytes. Needs Esper's extra ``urza``.
"""
