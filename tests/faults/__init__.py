"""Faults as tests: something breaks at a chosen point of a real run, and nothing may be lost by it.

``runs`` starts real commands, ``fault`` says what breaks where, ``operations`` and ``moments`` make
it break, ``proving`` looks at what is left and resumes, ``kinds`` lists what is drawn at random.
"""
