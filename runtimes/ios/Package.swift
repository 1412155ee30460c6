// swift-tools-version: 5.9
import PackageDescription

// Liger.xcframework is this repository's library built for iOS (see README.md); CLiger is its C header as a module.
let package = Package(
    name: "Liger",
    platforms: [.iOS(.v16), .macOS(.v13)],
    products: [.library(name: "Liger", targets: ["Liger"])],
    targets: [
        .binaryTarget(name: "LigerBinary", path: "Liger.xcframework"),
        .target(name: "CLiger", dependencies: ["LigerBinary"], path: "Sources/CLiger"),
        .target(name: "Liger", dependencies: ["CLiger"], path: "Sources/Liger"),
    ]
)
