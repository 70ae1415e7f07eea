"""Frame sizes and clip lengths of Open-Sora 1.2.

A size is (height, width) in pixels; an aspect ratio is written H:W, so "9:16" is a landscape picture and
"16:9" a portrait one (upstream's convention). The numbers are those of the v1.2.0 release; they are listed
and not computed, since the release rounds some entries differently from others. tests/golden/aspect.json pins
them.
"""

_TABLE = """
ratio  144p       240p       360p       480p       720p       1080p      2k         4k
3:8    117x312    196x522    294x784    392x1046   588x1568   882x2352   1176x3136  1764x4704
9:21   125x291    210x490    314x732    420x980    628x1466   942x2198   1256x2930  1886x4400
12:25  133x277    222x462    332x692    444x925    666x1388   998x2080   1330x2770  1996x4158
1:2    135x270    226x452    340x680    452x904    678x1356   1018x2036  1358x2716  2036x4072
9:17   139x262    232x438    350x662    466x880    698x1318   1048x1980  1398x2640  2096x3960
27:50  141x260    236x436    352x652    470x870    706x1306   1058x1958  1412x2612  2118x3918
9:16   144x256    240x426    360x640    480x854    720x1280   1080x1920  1440x2560  2160x3840
5:8    151x241    252x404    380x608    506x810    758x1212   1138x1820  1518x2428  2276x3642
2:3    156x234    262x393    392x588    522x784    784x1176   1176x1764  1568x2352  2352x3528
3:4    166x221    276x368    416x554    554x738    832x1110   1248x1664  1662x2216  2494x3326
1:1    192x192    320x320    480x480    640x640    960x960    1440x1440  1920x1920  2880x2880
4:3    221x165    370x278    554x416    740x555    1108x832   1662x1246  2218x1664  3326x2494
3:2    235x156    392x262    588x392    784x522    1176x784   1764x1176  2352x1568  3528x2352
16:9   256x144    426x240    640x360    854x480    1280x720   1920x1080  2560x1440  3840x2160
17:9   263x139    440x232    660x350    880x466    1320x698   1980x1048  2638x1396  3958x2096
2:1    271x135    452x226    678x340    906x454    1358x680   2036x1018  2716x1358  4072x2036
50:27  277x132    462x222    692x332    924x444    1386x666   2078x998   2772x1330  4156x1994
"""


def _read_table(table):
    """Parse the table above into {resolution: {ratio: (height, width)}}."""
    (_, *resolutions), *rows = (line.split() for line in table.split("\n") if line)
    sizes: dict[str, dict[str, tuple[int, int]]] = {resolution: {} for resolution in resolutions}
    for ratio, *cells in rows:
        for resolution, cell in zip(resolutions, cells, strict=True):
            height, width = cell.split("x")
            sizes[resolution][ratio] = int(height), int(width)
    return sizes


ASPECT_RATIOS = _read_table(_TABLE)
# The square-bucket resolutions share one named ratio with the table above.
ASPECT_RATIOS.update(
    {
        "256": {"12:25": (176, 368)},
        "512": {"12:25": (352, 736)},
        "1024": {"12:25": (704, 1472)},
        "2048": {"12:25": (1408, 2944)},
    }
)

# "2s" is two seconds at about 25 frames per second, "1x" the same: 51 frames, three VAE chunks of 17.
NUM_FRAMES_MAP = {f"{n}x": 51 * n for n in (1, 2, 4, 8, 16)} | {f"{2 * n}s": 51 * n for n in (1, 2, 4, 8, 16)}


def get_image_size(resolution, ar_ratio):
    """(height, width) in pixels.

    Args:
        resolution: name such as "240p" or "720p".
        ar_ratio: H:W such as "9:16".

    Raises:
        ValueError: unknown resolution, or a ratio it does not come in.
    """
    sizes = ASPECT_RATIOS.get(str(resolution))
    if sizes is None:
        raise ValueError(f"resolution={resolution!r} is unknown; choose one of {', '.join(ASPECT_RATIOS)}")
    if ar_ratio not in sizes:
        raise ValueError(
            f"aspect_ratio={ar_ratio!r} does not exist at resolution {resolution!r}; choose one of "
            f"{', '.join(sizes)} (height:width)"
        )
    return sizes[ar_ratio]


def get_num_frames(num_frames):
    """The pixel frames of a duration ("4s"), a multiple of 51 frames ("2x") or a number (16, "16").

    Raises:
        ValueError: neither a known name nor a positive whole number.
    """
    if num_frames in NUM_FRAMES_MAP:
        return NUM_FRAMES_MAP[num_frames]
    if not str(num_frames).isdecimal() or int(num_frames) < 1:
        raise ValueError(
            f"num_frames={num_frames!r} is not valid; use a whole number of at least 1 or one of "
            f"{', '.join(NUM_FRAMES_MAP)}"
        )
    return int(num_frames)
