# Warnings are errors, for gcc and clang alike; hardening in release; sanitizers on request.
# -Wno-format-truncation: fixed-size fields are cut on purpose, everywhere by snprintf.
add_compile_options(-Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith
  -Wwrite-strings -Wvla -Wformat=2 -Wswitch-enum -Wundef -Wno-unused-parameter -fno-common
  -fstack-protector-strong -fno-strict-aliasing -D_GNU_SOURCE)
if(CMAKE_C_COMPILER_ID STREQUAL "GNU")
  add_compile_options(-Wno-format-truncation)
endif()
if(CMAKE_BUILD_TYPE STREQUAL "Release")
  add_compile_options(-O2 -g1 -D_FORTIFY_SOURCE=2)
  add_link_options(-Wl,-z,relro,-z,now)
endif()
if(AIRLOCK_SANITIZE)
  add_compile_options(-fsanitize=${AIRLOCK_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all -O1 -g)
  add_link_options(-fsanitize=${AIRLOCK_SANITIZE})
endif()
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
